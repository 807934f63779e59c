"""Other loaders in the place of ours: torchdata's over our samples, its position saved as JSON."""

import json

import numpy as np
import pytest
import torch

from fasttrain.data import Loader, Windows

SOURCE = Windows(np.random.default_rng(0).integers(0, 256, 600).astype(np.uint8), 16, seed=3)


class Samples(torch.utils.data.Dataset):
    """Our samples, which are in a shuffled order already, for any loader that wants a map-style data set."""

    def __len__(self):
        return len(SOURCE)

    def __getitem__(self, i):
        return {name: torch.from_numpy(values[0]) for name, values in SOURCE.fetch(np.array([i])).items()}


def stateful(workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(Samples(), batch_size=4, num_workers=workers, drop_last=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_torchdata_gives_the_same_batches_and_resumes(workers):
    with Loader(SOURCE, 4, stop=len(SOURCE)) as ours:
        expected = [batch["tokens"] for batch in ours]
    loader = stateful(workers)
    batches = iter(loader)
    found = [next(batches)["tokens"] for _ in range(3)]
    state = json.loads(json.dumps(loader.state_dict()))
    again = stateful(workers)
    again.load_state_dict(state)
    found += [batch["tokens"] for batch in again]
    assert torch.equal(torch.stack(found), torch.stack(expected))
