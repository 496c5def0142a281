from .augmentation import DiffusionAugmentation as DiffusionAugmentation
from .bank import ImagePool as ImagePool
from .bank import teacher_digest as teacher_digest
from .bank import write_bank as write_bank
from .contrastive import Contrastive as Contrastive
from .diffusion import Backend as Backend
from .diffusion import Identity as Identity
from .diffusion import ImageToImage as ImageToImage
from .diffusion import ImageVariation as ImageVariation
from .diffusion import Tiny as Tiny
from .diffusion import Variations as Variations
from .filtering import cosine_scores as cosine_scores
from .generators import Generator as Generator
from .inversion import Adversary as Adversary
from .inversion import GeneratorInversion as GeneratorInversion
from .inversion import Inversion as Inversion
from .inversion import PixelInversion as PixelInversion
from .inversion import Synthesized as Synthesized
from .module import DataFreeDistillation as DataFreeDistillation
from .students import (
    AlignHead as AlignHead,
)
from .students import (
    RotationHead as RotationHead,
)
from .students import (
    kd_losses as kd_losses,
)
from .students import (
    rotation_labels as rotation_labels,
)
from .students import (
    rotations as rotations,
)
from .synthesis import BankSynthesis as BankSynthesis
from .teacher import Teacher as Teacher
from .tiny_diffusion import TinyDiffusion as TinyDiffusion
