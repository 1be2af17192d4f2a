"""Music: a next-note model of old melodies, beside n-grams of notes, and a melody of its own as a MIDI file.

Thirty folk songs, hymns and carols in the public domain, in a subset of ABC notation, each transposed to all twelve
keys. A note is a symbol, pitch and duration together; an LSTM foretells the next one from all before, and so can know
the phrase, the metre and the key. Every melody is foretold by a model that has not heard it in any key: five models
learn from four fifths of them each. The baseline is n-grams with Witten-Bell smoothing from the same notes in the
same keys; of 1- to 5-grams, bigrams are the best. Then the last model plays a melody of its own (one to many).

With --quick one model is made in place of five, with fewer epochs.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import argparse
import re
import tempfile

import numpy as np

from common import ngram_perplexity, report
from fastrnn import LSTM
from fastrnn.train import (
    Adam,
    Cosine,
    CrossEntropy,
    Dropout,
    Embedding,
    Linear,
    Sequential,
    Trainer,
    generate,
    perplexity,
)

# C to B is the octave of middle C, c to b the one above; a comma is an octave down, ^ sharp, _ flat, z a rest. The
# number is a duration: 2 is a crotchet or, where the metre needs shorter notes, a quaver.
MELODIES = {
    "Frère Jacques": "C2D2E2C2 C2D2E2C2 E2F2G4 E2F2G4 GAGFE2C2 GAGFE2C2 C2G,2C4 C2G,2C4",
    "Ah vous dirai-je, maman": """C2C2G2G2 A2A2G4 F2F2E2E2 D2D2C4 G2G2F2F2 E2E2D4 G2G2F2F2 E2E2D4 C2C2G2G2 A2A2G4
        F2F2E2E2 D2D2C4""",
    "Ode to Joy": """E2E2F2G2 G2F2E2D2 C2C2D2E2 E3DD4 E2E2F2G2 G2F2E2D2 C2C2D2E2 D3CC4 D2D2E2C2 D2EFE2C2 D2EFE2D2
        C2D2G,4 E2E2F2G2 G2F2E2D2 C2C2D2E2 D3CC4""",
    "Au clair de la lune": """C2C2C2D2 E4D4 C2E2D2D2 C8 C2C2C2D2 E4D4 C2E2D2D2 C8 D2D2D2D2 A,4A,4 D2C2B,2A,2 G,8
        C2C2C2D2 E4D4 C2E2D2D2 C8""",
    "London Bridge": "G3AG2F2 E2F2G4 D2E2F4 E2F2G4 G3AG2F2 E2F2G4 D4G4 E2C6",
    "Hänschen klein": """G2E2E4 F2D2D4 C2D2E2F2 G2G2G4 G2E2E4 F2D2D4 C2E2G2G2 C8 D2D2D2D2 D2E2F4 E2E2E2E2 E2F2G4 G2E2E4
        F2D2D4 C2E2G2G2 C8""",
    "When the Saints": "C2E2F2 G8 z2C2E2F2 G8 z2C2E2F2 G4E4 C4E4 D8 z2E2E2D2 C6C2 E4G4 G2F6 z4E2F2 G4E4 C4D4 C8",
    "Amazing Grace": "D2 G4BG B4A2 G4E2 D4D2 G4BG B4A2 d6 z4B2 d3BdB G4D2 E3GGE D4D2 G4BG B4A2 G6",
    "Greensleeves": """A2 c4d2e3fe2 d4B2G3AB2 c4A2A3^GA2 B4^G2E4A2 c4d2e3fe2 d4B2G3AB2 c3BA2^G3^F^G2 A6A6 g6g3fe2
        d4B2G3AB2 c4A2A3^GA2 B4^G2E6 g6g3fe2 d4B2G3AB2 c3BA2^G3^F^G2 A6A6""",
    "Auld Lang Syne": """C2 F3FF2A2 G3FG2A2 F3FA2c2 d6d2 c3AA2F2 G3FG2A2 F3DD2C2 F6d2 c3AA2F2 G3FG2d2 c3AA2c2 d6d2
        c3AA2F2 G3FG2A2 F3DD2C2 F6""",
    "Mary Had a Little Lamb": "E2D2C2D2 E2E2E4 D2D2D4 E2G2G4 E2D2C2D2 E2E2E2E2 D2D2E2D2 C8",
    "Row, Row, Row Your Boat": "C3C3 C2DE3 E2DE2F G6 cccGGG EEECCC G2FE2D C6",
    "Old MacDonald": """c2c2c2G2 A2A2G4 e2e2d2d2 c6G2 c2c2c2G2 A2A2G4 e2e2d2d2 c6GG c2c2c2GG c2c2c4 ccc2ccc2 ccccc2c2
        c2c2c2G2 A2A2G4 e2e2d2d2 c8""",
    "Yankee Doodle": """c2c2d2e2 c2e2d2G2 c2c2d2e2 c4B4 c2c2d2e2 f2e2d2c2 B2G2A2B2 c4c4 A3BA2G2 A2B2c4 G3AG2F2 E4G4
        A3BA2G2 A2B2c2A2 G2c2B2d2 c4c4""",
    "Jingle Bells": """E2E2E4 E2E2E4 E2G2C3D E8 F2F2F3F F2E2E2EE E2D2D2E2 D4G4 E2E2E4 E2E2E4 E2G2C3D E8 F2F2F3F F2E2E2EE
        G2G2F2D2 C8""",
    "Silent Night": """G3AG2E6 G3AG2E6 d4d2B6 c4c2G6 A4A2c3BA2 G3AG2E6 A4A2c3BA2 G3AG2E6 d4d2f3dB2 c6e6 c2G2E2G3FD2
        C12""",
    "Oh! Susanna": """CD E2G2G3A G2E2C3D E2E2D2C2 D6CD E2G2G3A G2E2C3D E2E2D2D2 C8 F4F4 A2A4A2 G2G2E2C2 D6CD E2G2G3A
        G2E2C3D E2E2D2D2 C6""",
    "Alle meine Entchen": "C2D2E2F2 G4G4 A2A2A2A2 G8 A2A2A2A2 G8 F2F2F2F2 E4E4 D2D2D2D2 C8",
    "Good King Wenceslas": """C2C2C2D2 C2C2G,4 A,2G,2A,2B,2 C4C4 C2C2C2D2 C2C2G,4 A,2G,2A,2B,2 C4C4 G2F2E2D2 E2D2C4
        A,2G,2A,2B,2 C4C4 G,2G,2A,2B,2 C2C2D4 G2F2E2D2 C4F4 C8""",
    "Clementine": "CC C2G,2EE E2C2CE G4FE D4DE F2F2ED E2C2CE D2G,2B,D C4",
    "My Bonnie": "G2 e3dc2 d2c2A2 G2E6 z2G2 e3dc2 c2B2c2 d6 z4G2 e3dc2 d2c2A2 G2E6 z2G2 A2d2c2 B2A2B2 c6",
    "Brahms's Lullaby": """EE G4EE G4EG c2B3A A2G2DE F2D2DE F4DF BAG2B2 c4CC c4AF G4EC F2G2A2 G4CC c4AF G4EC F2E2D2
        C4""",
    "Drunken Sailor": """A2AAA2AA A2D2F2A2 G2GGG2GG G2C2E2G2 A2AAA2AA A2B2c2d2 c2A2G2E2 D4D4 A4A4 A2D2F2A2 G4G4 G2C2E2G2
        A4A4 A2B2c2d2 c2A2G2E2 D4D4""",
    "Joy to the World": """c4B3A G6F2 E4D4 C6G2 A6A2 B6B2 c6c2 c2B2A2G2 G3FE2c2 c2B2A2G2 G3FE2E2 E2E2E2EF G6FE D2D2D2DE
        F6ED C2c4A2 G3FE2F2 E4D4 C8""",
    "O Tannenbaum": """G2 c3cc6d2 e3ee6e2 d2e2f4B4 d4c4z2G2 c3cc6d2 e3ee6e2 d2e2f4B4 d4c4z2g2 g2e2a6g2 g2f2f6f2 f2d2g6f2
        f2e2e4z2G2 c3cc6d2 e3ee6e2 d2e2f4B4 d4c4""",
    "Pop Goes the Weasel": "G, C2CD2D EGEC2G, C2CD2D E3C2G, C2CD2D EGEC3 A3D2F E3C3",
    "Skip to My Lou": "E4C4 E2EEG4 D4B,4 D2DDF4 E4C4 E2EEG4 D2EFE2D2 C4C4",
    "This Old Man": "G2E2G4 G2E2G4 A2G2F2E2 D2E2F2EF G2C2CCC2 CDEFG4 G2D2D2F2 E2D2C4",
    "Sur le pont d'Avignon": "C2C2C4 D2D2D4 E2F2G2C2 B,2C2D2G,2 C2C2C4 D2D2D4 E2F2G2C2 D2B,2C4",
    "Kuckuck, Kuckuck": "G2E2z2 G2E2z2 D2C2D2 C4z2 D2D2E2 F4D2 E2E2F2 G4E2 G2E2z2 G2E2z2 F2E2D2 C4",
}
FOLDS = 5
END = (-1, 0)  # no pitch, no duration: what stands between melodies
Note = tuple[int, int]  # the pitch as MIDI counts it, 60 for middle C, or 0 for a rest; the duration


def parse(text: str) -> list[Note]:
    notes = []
    for accidental, letter, octave, duration in re.findall(r"([\^_]?)([A-Ga-gz])(,*)(\d*)", text):
        pitch = 60 + {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}.get(letter.upper(), 0)
        pitch += {"^": 1, "_": -1, "": 0}[accidental] + 12 * letter.islower() - 12 * len(octave)
        notes.append((0 if letter == "z" else pitch, int(duration or 1)))
    return notes


def in_all_keys(melody: list[Note]) -> list[list[Note]]:
    """Return the melody from 6 semitones lower to 5 higher."""
    return [[(pitch and pitch + up, duration) for pitch, duration in melody] for up in range(-6, 6)]


def padded(melodies: list[list[Note]], vocabulary: dict[Note, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a model reads, (N, T), what comes next, (N, T), and the lengths."""
    lengths = np.array([len(melody) + 1 for melody in melodies])
    symbols = np.full((len(melodies), lengths.max() + 1), vocabulary[END])
    for row, melody in zip(symbols, melodies, strict=True):
        row[1 : len(melody) + 1] = [vocabulary[note] for note in melody]
    return symbols[:, :-1], symbols[:, 1:], lengths


def train(melodies: list[list[Note]], vocabulary: dict[Note, int], epochs: int) -> Trainer:
    model = Sequential(
        embedding=Embedding(len(vocabulary), 64, seed=0),
        noise=Dropout(0.2, seed=1),
        lstm=LSTM(64, 128, seed=0),
        dropout=Dropout(0.5, seed=2),
        output=Linear(128, len(vocabulary), seed=0),
    )
    x, y, lengths = padded(melodies, vocabulary)
    optimizer = Adam(Cosine(5e-3, steps=epochs * -(-len(x) // 16)))
    trainer = Trainer(model, CrossEntropy(), optimizer, clip_norm=1.0)
    trainer.fit(x, y, lengths=lengths, epochs=epochs, batch_size=16, progress=False)
    return trainer


def play(notes: list[Note], path: str) -> None:
    """Write a MIDI file, if mido is installed."""
    try:
        from mido import Message, MidiFile, MidiTrack
    except ImportError:
        print("no MIDI file is written: that takes mido, pip install mido")
        return
    file, pause = MidiFile(), 0
    track = MidiTrack([Message("program_change", program=73)])  # a flute
    file.tracks.append(track)
    for pitch, duration in notes:
        ticks = duration * file.ticks_per_beat // 2
        if pitch == 0:
            pause += ticks
            continue
        track.append(Message("note_on", note=pitch, time=pause))
        track.append(Message("note_off", note=pitch, time=ticks))
        pause = 0
    file.save(path)
    print(f"{path}: {len(notes)} notes, {file.length:.0f} seconds")


def listen(quick: bool, melodies: list[list[Note]], vocabulary: dict[Note, int]) -> tuple[Trainer, list[float]]:
    """Return the last model, and the perplexity of a held-out note: by the models, and by 1-, 2- and 3-grams."""
    surprise, count = np.zeros(4), 0
    for fold in range(1 if quick else FOLDS):
        held_out = melodies[fold::FOLDS]
        learned = [version for melody in melodies if melody not in held_out for version in in_all_keys(melody)]
        trainer = train(learned, vocabulary, epochs=8 if quick else 20)
        x, y, lengths = padded(held_out, vocabulary)
        before, after = ([note for melody in part for note in (*melody, END)] for part in (learned, held_out))
        grams = [ngram_perplexity(before, after, order, len(vocabulary)) for order in (1, 2, 3)]
        found = [perplexity(trainer.evaluate(x, y, lengths=lengths)["loss"]), *grams]
        print(
            f"{len(held_out)} melodies: LSTM {found[0]:.1f}; 1-, 2-, 3-grams", *[f"{p:.1f}" for p in grams], flush=True
        )
        surprise, count = surprise + len(after) * np.log(found), count + len(after)
    return trainer, np.exp(surprise / count).tolist()


def compose(model: Sequential, vocabulary: dict[Note, int]) -> list[Note]:
    """Return the longest of those melodies out of ten that the model brings to an end."""
    end, notes = vocabulary[END], list(vocabulary)
    drawn = generate(model, np.full((10, 1), end), 80, temperature=0.8, seed=0)
    ended = [row[: row.tolist().index(end)] for row in drawn if end in row]
    return [notes[label] for label in max(ended, key=len, default=drawn[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run of less than 20 seconds")
    parser.add_argument("midi", nargs="?", help="the MIDI file to write; music.mid in a new folder by default")
    given = parser.parse_args()
    melodies = [parse(text) for text in MELODIES.values()]
    known = {note for melody in melodies for version in in_all_keys(melody) for note in version}
    vocabulary = {note: label for label, note in enumerate([END, *sorted(known)])}

    trainer, (ours, _, bigrams, _) = listen(given.quick, melodies, vocabulary)
    play(compose(trainer.model, vocabulary), given.midi or f"{tempfile.mkdtemp()}/music.mid")
    report("perplexity of a note", ours, "bigrams", bigrams)


if __name__ == "__main__":
    main()
