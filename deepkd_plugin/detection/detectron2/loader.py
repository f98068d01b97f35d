"""Training images whose order and augmentation depend on the seed and the iteration alone.

detectron2's loader starts again if a run is resumed. This one makes the same batches as its TrainingSampler with
AspectRatioGroupedDataset, but it can start at any iteration, and each draw of an image seeds its own augmentation. So
a resumed run is the uninterrupted one.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch
from detectron2.data import DatasetMapper, MapDataset, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ... import device
from ...data.workers import end_if_left
from ...errors import UserError

Drawn = tuple[int, int]
"""The number of a draw, counted over all passes and processes, and the index of the image drawn."""


class Batches(Sampler[list[Drawn]]):
    """The batches of one process, without end. In a batch either all images are wide or none is.

    wide: for each image, whether it is wider than high. size: images in a batch. seed: of the order, the same in all
    processes. rank, world: this process and the number of processes. `start` is how many batches to skip.
    """

    def __init__(self, wide: Sequence[bool], size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.wide, self.size, self.seed, self.rank, self.world = wide, size, seed, rank, world
        self.start = 0

    def __iter__(self) -> Iterator[list[Drawn]]:
        return islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[Drawn]]:
        unfinished: dict[bool, list[Drawn]] = {True: [], False: []}
        for drawn in islice(zip(count(), self._order()), self.rank, None, self.world):
            batch = unfinished[self.wide[drawn[1]]]
            batch.append(drawn)
            if len(batch) == self.size:
                yield list(batch)
                batch.clear()

    def _order(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.wide), generator=generator).tolist()


class _Seeded(Dataset[Any]):
    """A data set that seeds the generators with the number of a draw before it augments the image."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, drawn: Drawn) -> Any:
        number, index = drawn
        device.seed_everything(self.seed, number)
        return self.dataset[index]


def build_train_loader(cfg: Any) -> DataLoader[Any]:
    """Build a loader of cfg.DATASETS.TRAIN in TrainingSampler's order; its `batch_sampler` is a Batches.

    If cfg.SEED is negative, the seed is drawn. Raises UserError if the processes cannot share a batch equally.
    """
    images = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    world = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world:
        raise UserError(
            f"config: SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of {world}, one share "
            f"for each process"
        )
    seed = comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    wide = [grouped and image["width"] > image["height"] for image in images]
    dataset = MapDataset(DatasetFromList(images, copy=False), DatasetMapper(cfg, is_train=True))
    return DataLoader(
        _Seeded(dataset, seed),
        batch_sampler=Batches(wide, cfg.SOLVER.IMS_PER_BATCH // world, seed, comm.get_rank(), world),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        worker_init_fn=end_if_left,
    )
