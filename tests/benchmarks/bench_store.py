"""What reading and preparing data costs; prints the README's table. About eight minutes and 8 GiB of disk.

    python tests/benchmarks/bench_store.py [FOLDER OF IMAGES]      CLASS/IMAGE; by default 500 x 375 JPEGs made here

prepare: the rate of `prepare` against the same decoding in as many processes that write nothing.
read: shuffled batches of 256 from a store of 20,000 images at 224 px, against the published way (PIL decodes and
resizes each image), both on one core and in turns; once as uint8 and once as float in [0, 1].
open: a store of 1,281,167 rows of 32 px.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torchvision import transforms

from lorvp.bench import __main__ as bench
from lorvp.data import prepare, store
from lorvp.data.store import Description, Manifest, SplitFiles, Store, StoredImage
from lorvp.utils.files import write_json

ROWS, BATCH, SIZE, FILES, ROUNDS = 20_000, 256, 224, 10_000, 3


def row(what: str, measured: str, goal: str) -> None:
    print(f"| {what} | {measured} | {goal} |", flush=True)


def make_images(root: Path) -> None:
    """JPEGs of 500 x 375 pixels and 100 KB, as ImageNet's are."""
    random = np.random.default_rng(0)
    for i in range(FILES // 10):
        path = root / f"class{i % 5}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        bench.jpeg(random, path)
        for again in range(1, 10):
            os.link(path, path.with_stem(f"{i}-{again}"))


def synthetic(folder: Path, rows: int, size: int) -> Store:
    """A store of that many rows, its pixels random."""
    folder.mkdir()
    each = prepare.PART_BYTES // (3 * size**2)
    pixels = np.random.default_rng(0).integers(0, 256, (each, size, size, 3), dtype=np.uint8)
    about = Description(dataset="synthetic", image_size=size, transform="", class_names=("a",), source="")
    parts = [
        store.write_part(folder / f"train-{n:05}.arrow", [StoredImage(p, 0) for p in pixels[: rows - start]], about)
        for n, start in enumerate(range(0, rows, each))
    ]
    index = store.write_index(folder / "train-index.arrow", np.zeros(rows), [f"{i:08}.jpg" for i in range(rows)], about)
    manifest = Manifest(format_version=1, description=about, splits={"train": SplitFiles(index=index, parts=parts)})
    write_json(folder / "store.json", manifest.model_dump(mode="json"))
    return Store.open(folder)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


READ_IT = f"""
import sys
from pathlib import Path
from lorvp.data import loader
from lorvp.config import DatasetConfig
from lorvp.data.datasets import load

def anonymous():
    (kib,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(kib) / 1024

before = anonymous()
images = load(DatasetConfig(name="store", root=Path(sys.argv[1])), {SIZE}).train
for pixels, labels in loader.batches(images, {BATCH}, loader.epoch_order(len(images), 0, 1)):
    pass
print(anonymous() - before)
"""


def resident(folder: Path) -> float:
    """MiB of a process that reads all of a store once, without what is a file's and what its imports take."""
    done = subprocess.run([sys.executable, "-c", READ_IT, folder], capture_output=True, text=True, check=True)
    return float(done.stdout)


def read(files: list[Path], folder: Path) -> None:
    kept = synthetic(folder / "read", ROWS, SIZE).splits["train"]
    published = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor()])
    random = np.random.default_rng(1)

    def by_pil() -> None:
        for path in files[:64]:
            published(Image.open(path).convert("RGB"))

    def whole_pass(as_float: bool) -> None:
        for rows in random.permutation(ROWS)[: BATCH * 16].reshape(-1, BATCH):
            batch = torch.from_numpy(kept.read(rows)).permute(0, 3, 1, 2)
            if as_float:
                batch.float().div_(255)

    whole_pass(False)  # the disk's cache is the store's usual state
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        each = seconds(by_pil) / 64
        for as_float, ratio in ratios.items():
            ratio.append(each / (seconds(lambda: whole_pass(as_float)) / (16 * BATCH)))  # noqa: B023
    for as_float, goal in ((False, 20), (True, 3)):
        what = "float batches" if as_float else "uint8 batches"
        row(f"{what} from the store : PIL a file, one core", f"{statistics.median(ratios[as_float]):.0f}", f">= {goal}")
    synthetic(folder / "few", ROWS // 4, SIZE)
    sizes = [f"{resident(folder / name):.0f} MiB" for name in ("few", "read")]
    what = f"resident beyond the disk's cache and the imports, {ROWS // 4:,} and {ROWS:,} images"
    row(what, ", ".join(sizes), "<= 300 MiB, flat")
    shutil.rmtree(folder / "few")
    shutil.rmtree(folder / "read")


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


@contextmanager
def little_free_memory() -> Iterator[None]:
    """A virtual machine may hand freed memory back to its host, and gets it again ten times slower than it is written.

    With 2 GiB left over the disk's cache has to use its own pages again, as on a machine whose memory is its own.
    """
    size = psutil.virtual_memory().free - (2 << 30)
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as held:
        for start in range(0, size, 1 << 20):
            held[start : start + (1 << 20)] = bytes(min(1 << 20, len(held) - start))
        yield


def prepare_rate(root: Path, files: list[Path], folder: Path) -> None:
    workers = len(os.sched_getaffinity(0))

    def bare() -> None:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(decode_all, [files[i :: 4 * workers] for i in range(4 * workers)]))

    def ours(out: Path) -> None:
        with redirect_stdout(sys.stderr):
            prepare.prepare("image_folder", root, out, size=SIZE)

    with little_free_memory():
        ratios = [seconds(bare) / seconds(lambda: ours(folder / f"out{i}")) for i in range(2 * ROUNDS)]  # noqa: B023
    print("each round:", ", ".join(f"{ratio:.2f}" for ratio in ratios), file=sys.stderr)
    row(f"`prepare` : decoding alone, {workers} processes", f"{statistics.median(ratios[ROUNDS:]):.2f}", ">= 0.9")
    for i in range(2 * ROUNDS):
        shutil.rmtree(folder / f"out{i}")


def opening(folder: Path) -> None:
    synthetic(folder / "large", 1_281_167, 32)
    milliseconds = 1e3 * statistics.median(seconds(lambda: Store.open(folder / "large")) for _ in range(ROUNDS))
    row("opening a store of 1,281,167 rows", f"{milliseconds:.1f} ms", "< 50 ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="lorvp-bench-"))
    try:
        root = Path(sys.argv[1]) if sys.argv[1:] else work / "images"
        if not sys.argv[1:]:
            make_images(root)
        files = [path for path in sorted(root.glob("*/*")) if path.is_file()][:FILES]
        row("", "measured", "goal")
        row("---", "---", "---")
        prepare_rate(root, files, work)
        read(files, work)
        opening(work)
    finally:
        shutil.rmtree(work)
