"""One process of two that share lengths while the group that computes waits for two seconds only."""

import datetime
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.training.synthetic import IMAGE, TEXT, Samples, tiny_model
from videollama3.training.length_index import shared_lengths

PATIENCE_SECONDS = 2.0
MEASURING_SECONDS = 6.0


class Slow(Samples):
    """A row takes as long as a large set does."""

    def __getitem__(self, index):
        time.sleep(MEASURING_SECONDS / len(self))
        return super().__getitem__(index)


def main():
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.distributed.init_process_group("gloo")
    # The other may have started seconds later.
    torch.distributed.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE_SECONDS))
    rank = torch.distributed.get_rank()
    dataset = Slow(tiny_model()[1], [TEXT, IMAGE])
    arguments = SimpleNamespace(world_size=2, process_index=rank, device=torch.device("cpu"))
    lengths = shared_lengths(dataset, arguments, folder=None)
    told = [None, None]
    torch.distributed.all_gather_object(told, lengths.tolist())
    if rank == 0:
        Path(work["result"]).write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


main()
