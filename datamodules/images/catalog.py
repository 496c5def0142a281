"""Facts about the data sets, known without loading anything."""

from __future__ import annotations

from dataclasses import dataclass

from leanlight.contracts.errors import UserError, nearest


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is loaded.

    Args:
        name: by which `ImageDataModule` and ``leanlight data`` know it.
        title: its full name.
        shape: (C, H, W) of an item; H and W are the default of `image_size` where the files' sizes differ.
        classes: label names, index = label; or their number where names come with the files (0: any number).
        train: items of the official training part; 0: depends on the files.
        test: items of the official test part; 0: depends on the files.
        mean: of the training part in [0, 1], a channel each.
        std: standard deviation of the training part in [0, 1], a channel each.
        licence: under which it may be used.
        origin: who made it.
        size_mb: what a download, or the files, take in MB.
        get: how to come by it.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...] | int
    train: int
    test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    origin: str
    size_mb: float
    get: str

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 where it depends on the files."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def facts(self) -> str:
        """One line on its items, for ``leanlight data list``."""
        facts = ["x".join(map(str, self.shape))]
        if self.train:
            facts += [f"{self.num_classes} classes", f"{self.train:,} + {self.test:,} items"]
        return ", ".join(facts)

    @property
    def by_path(self) -> bool:
        """Whether its files are the user's, in a folder that ``path`` names."""
        return not self.train

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label names; numbers where the names come with the files."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes


_DIGIT_NAMES = tuple("0123456789")


_ALL = [
    DatasetInfo(
        name="digits",
        title="Optical recognition of handwritten digits",
        shape=(1, 8, 8),
        classes=_DIGIT_NAMES,
        train=1437,
        test=360,
        mean=(0.3044,),
        std=(0.3754,),
        licence="CC BY 4.0",
        origin="UCI; Alpaydin and Kaynak 1998; inside scikit-learn",
        size_mb=0.1,
        get="always there",
    ),
    DatasetInfo(
        name="fashion_mnist",
        title="Fashion-MNIST",
        shape=(1, 28, 28),
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        train=60_000,
        test=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        licence="MIT",
        origin="Zalando Research; Xiao, Rasul and Vollgraf 2017",
        size_mb=30,
        get="leanlight data prepare fashion_mnist, or Debian package dataset-fashion-mnist; 4,000 items come along",
    ),
    DatasetInfo(
        name="mnist",
        title="MNIST",
        shape=(1, 28, 28),
        classes=_DIGIT_NAMES,
        train=60_000,
        test=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        licence="CC BY-SA 3.0",
        origin="LeCun, Cortes and Burges 1998",
        size_mb=12,
        get="leanlight data prepare mnist",
    ),
    DatasetInfo(
        name="cifar10",
        title="CIFAR-10",
        shape=(3, 32, 32),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        train=50_000,
        test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        licence="none stated",
        origin="Krizhevsky 2009",
        size_mb=170,
        get="leanlight data prepare cifar10",
    ),
    DatasetInfo(
        name="cifar100",
        title="CIFAR-100, fine labels",
        shape=(3, 32, 32),
        classes=100,
        train=50_000,
        test=10_000,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        licence="none stated",
        origin="Krizhevsky 2009",
        size_mb=169,
        get="leanlight data prepare cifar100",
    ),
    DatasetInfo(
        name="svhn",
        title="Street View House Numbers, cropped",
        shape=(3, 32, 32),
        classes=_DIGIT_NAMES,
        train=73_257,
        test=26_032,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        licence="non-commercial use",
        origin="Netzer et al. 2011",
        size_mb=246,
        get="leanlight data prepare svhn",
    ),
    DatasetInfo(
        name="tiny_imagenet",
        title="Tiny ImageNet",
        shape=(3, 64, 64),
        classes=200,
        train=100_000,
        test=10_000,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        licence="ImageNet terms: non-commercial research",
        origin="Stanford CS231n; the official validation part serves as test",
        size_mb=237,
        get="leanlight data prepare tiny_imagenet",
    ),
    DatasetInfo(
        name="celeba",
        title="CelebA, aligned faces, 40 attributes",
        shape=(3, 64, 64),
        classes=40,
        train=162_770,
        test=19_962,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="non-commercial research",
        origin="Liu, Luo, Wang and Tang 2015",
        size_mb=1400,
        get="get img_align_celeba.zip and the list files from the authors, unpack them to ROOT/celeba",
    ),
    DatasetInfo(
        name="image_folder",
        title="Your own pictures: PATH/<class>/*.png, or PATH/train/<class>/*.png with PATH/test or PATH/val alike",
        shape=(3, 64, 64),
        classes=0,
        train=0,
        test=0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="yours",
        origin="your files",
        size_mb=0,
        get="--data.path PATH",
    ),
    *(
        DatasetInfo(
            name=name,
            title=title,
            shape=(3, 224, 224),
            classes=0,
            train=0,
            test=0,
            mean=(0.485, 0.456, 0.406),  # of ImageNet
            std=(0.229, 0.224, 0.225),
            licence="that of each set",
            origin=origin,
            size_mb=0,
            get="--data.path PATH",
        )
        for name, title, origin in (
            (
                "vtab",
                "A task of VTAB-1k: PATH/train800.txt, val200.txt, test.txt; val_fraction=0 trains on all 1,000",
                "Zhai et al. 2019",
            ),
            (
                "fgvc",
                "Fine-grained classes: PATH/train.json, val.json, test.json; val_fraction=0 trains on val.json, too",
                "Jia et al. 2022",
            ),
        )
    ),
]

CATALOG: dict[str, DatasetInfo] = {info.name: info for info in _ALL}


def describe(name: str) -> DatasetInfo:
    """The entry called `name`; UserError with the nearest name if there is none."""
    if name not in CATALOG:
        raise UserError(f"data set {name!r} is unknown{nearest(name, CATALOG)}; `leanlight data list` lists them")
    return CATALOG[name]
