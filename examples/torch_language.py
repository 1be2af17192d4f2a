"""Language in PyTorch: a character model with one import changed, and what that saves.

The model reads Python's documentation of itself and foretells each next character. It is trained for an epoch with
torch.nn.GRU and for the same epoch with fastrnn.torch.GRU in its place, which must end at the same loss; then it is
trained on, and its perplexity on text that it has not seen is compared with that of n-grams.
"""

import time

import torch
from torch import Tensor, nn

from common import documentation, is_quick, ngram_perplexity, report
from fastrnn.torch import GRU  # instead of: from torch.nn import GRU

STEPS, BATCH, HIDDEN = 100, 32, 256


class Model(nn.Module):
    def __init__(self, characters: int, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.recurrent = layer(64, HIDDEN)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, ids: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        output, state = self.recurrent(self.embedding(ids), state)
        return self.head(output), state


def streams(ids: Tensor, batch: int) -> Tensor:
    """Cut a text into `batch` columns, each of which goes on from window to window."""
    length = len(ids) // batch
    return ids[: length * batch].reshape(batch, length).T.contiguous()


def losses(model: Model, text: Tensor, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Go through the text once, window by window, training if there is an optimizer; return the mean loss."""
    state, total, count = None, 0.0, 0
    for start in range(0, len(text) - 1, STEPS):
        window = text[start : start + STEPS + 1]
        with torch.set_grad_enabled(optimizer is not None):
            logits, state = model(window[:-1], state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[1:].flatten())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        state = state.detach()  # a gradient goes back through one window
        total += loss.item() * (len(window) - 1)
        count += len(window) - 1
    return total / count


def epoch(model: Model, text: Tensor, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    start = time.perf_counter()
    loss = losses(model, text, optimizer)
    return loss, time.perf_counter() - start


def main() -> None:
    quick = is_quick(__doc__)
    text = documentation()
    text = text[: len(text) // 8] if quick else text
    cut, vocabulary = len(text) * 9 // 10, sorted(set(text))
    ids = torch.tensor([vocabulary.index(character) for character in text])
    training, test = streams(ids[:cut], BATCH), streams(ids[cut:], 1)

    results = {}
    for layer in (nn.GRU, GRU):
        torch.manual_seed(0)
        model = Model(len(vocabulary), layer)
        model(training[:2], None)[0].sum().backward()  # compiles, if it was not compiled before
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        results[layer] = loss, seconds = epoch(model, training, optimizer)
        print(f"{layer.__module__}.{layer.__name__}: loss {loss:.5f} after an epoch of {seconds:.2f} s", flush=True)
    (theirs, their_seconds), (ours, our_seconds) = results.values()
    if abs(ours - theirs) > 1e-3 * theirs:  # they round differently, and training doubles a difference many times
        raise SystemExit(f"the losses differ: {ours} with fastrnn.torch, {theirs} with torch.nn")

    for number in range(2, 4 if quick else 13):
        if number == 9:
            optimizer.param_groups[0]["lr"] = 1e-3
        loss, seconds = epoch(model, training, optimizer)
        print(f"epoch {number}: loss {loss:.3f}, {seconds:.1f} s", flush=True)
    perplexity = torch.tensor(losses(model, test)).exp().item()
    order = 2 if quick else 5
    baseline = ngram_perplexity(text[:cut], text[cut:], order, len(vocabulary))
    report("perplexity of a character", perplexity, f"{order}-grams", baseline)
    report("seconds an epoch", our_seconds, "torch.nn.GRU", their_seconds)


if __name__ == "__main__":
    main()
