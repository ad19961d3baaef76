"""The study's recipe in 2D (arXiv 2602.18614 at its date): AdamW 1e-4, batch 8, 100 epochs, three seeds.

    python -m vitmed.main --config=configs/vit2d.py:dataset=breastmnist,patch=7 --workdir=runs/breast_p7

Arguments: dataset (a 2D MedMNIST set, phantom2d, or folder:PATH for your own images), patch (7, or 7x14), variant (vit_ti, vit_s, vit_b,
vit_l), size (28, 64, 128, 224; of your own any, or 96x128 for height and width, or 0: as they are),
pretrained (a file, a finished run's folder, a name such as timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, which is vit_ti's default,
or empty: from scratch). Every field below is a flag: --config.train.epochs=20.
"""

import ml_collections

from vitmed import config as config_lib

# What a variant starts from unless something else is asked for: AugReg, ImageNet-21k and then ImageNet-1k (arXiv 2106.10270).
AUGREG = {
    "vit_ti": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b": "timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_l": "timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    given = config_lib.arguments(arg, dataset="breastmnist", patch=(7,), variant="vit_ti", size=(28,), pretrained="default")
    config = ml_collections.ConfigDict()
    config.seeds = (0, 1, 2)  # one independent run each, trained together

    config.data = ml_collections.ConfigDict()
    config.data.name = given["dataset"]
    config.data.rank = 2  # axes of an image: what this recipe is for
    config.data.size = given["size"]  # pixels along each axis; one entry stands for all axes
    config.data.resize = 0  # pixels along each axis that the network sees; 0: as they are
    config.data.invert = False  # the image seen is (256 - x) mod 256, the released code's uint8 overflow
    config.data.root = ""  # folder of .npz files; empty: $VITMED_DATA, then ~/.medmnist
    config.data.verify = True  # refuse a file whose MD5 is not the official one
    # Of own data, folder:PATH, alone:
    config.data.spacing = (0.0,)  # mm between pixels that images are resampled to, then cut or filled up to data.size; 0: resampled to it
    config.data.window = (
        "auto"  # what becomes 0 to 255: percentile, minmax, zscore, lung, LOW:HIGH, ...; auto: 8-bit as it is, else percentile
    )
    config.data.task = "auto"  # binary, multi-class, multi-label, ordinal; auto: by the labels
    config.data.classes = ""  # names in order, comma-separated; empty: those that occur, sorted
    config.data.shares = (0.7, 0.1, 0.2)  # of train, val and test, drawn by class and group where the CSV names no splits
    config.data.split_seed = 0  # of that draw
    config.data.folds = 0  # cross-validation: of so many parts one tests, the next one validates; 0: none
    config.data.fold = 0  # which part tests, from 0
    config.data.cache = ""  # folder of prepared images; empty: the user's cache folder
    config.data.placement = "auto"  # where the training images live: device, host, auto (device where they fit)

    config.model = ml_collections.ConfigDict()
    config.model.variant = given["variant"]
    config.model.patch_size = given["patch"]  # pixels; one entry stands for all axes
    config.model.patch_sizes = ""  # one network for several, such as 28,14,7,4 (of which patch_size is one); see docs/flexi.md
    config.model.kernel_size = (0,)  # pixels along each axis that a patch's token is computed from; 0: those of the patch
    default = AUGREG.get(given["variant"], "")
    config.model.pretrained = default if given["pretrained"] == "default" else given["pretrained"]  # empty: from scratch
    config.model.inflation = "average"  # how 2D weights come to the depth of 3D patches: average or center
    config.model.depth_positions = "copy"  # and their positions: copy, or sincos (a code of the depth added)
    config.model.position_resize = "bicubic"  # how positions come to the grid: bicubic, or cut (as the released code does)
    config.model.in_channels = 3  # gray images are copied to three; 1 sums the kernel of RGB weights instead
    # Of values in [0, 1]: auto (what belongs to the weights; 0.5 from scratch), one number, or one per channel.
    config.model.mean = ml_collections.FieldReference("auto", field_type=object)
    config.model.std = ml_collections.FieldReference("auto", field_type=object)
    # 3D alone: volumes go slice by slice through the 2D network, in views axial, coronal, sagittal (with commas); empty: in 3D patches.
    config.model.views = ""
    config.model.pooling = "auto"  # auto (the weights' own; cls from scratch), cls, mean, attention (a fresh query attends to the patches)
    # Of train.tune=lora alone: what is added to the layers named, alpha / rank times two matrices of this rank; see docs/finetuning.md.
    config.model.lora_rank = 8
    config.model.lora_alpha = 16.0
    config.model.lora_targets = "qkv,proj"  # patch_embed, q, k, v, qkv, proj, fc1, fc2; or of one block, block_00/attn/q
    # Of train.tune=adaptformer alone: a branch beside every MLP through so many channels, and what it is multiplied by.
    config.model.adapter_width = 64
    config.model.adapter_scale = 0.1
    config.model.attention = "auto"  # how it is computed: plain, blockwise (memory grows with tokens, not their square), cudnn, auto
    config.model.drop_path = 0.0  # stochastic depth: the rate of the last block
    config.model.dtype = "float32"  # of the arithmetic: float32 or bfloat16; parameters are float32

    config.train = ml_collections.ConfigDict()
    # What is trained: all; or of a frozen base the head alone, the last N blocks too (last:N), or what is added to it (lora, adaptformer).
    config.train.tune = "all"
    config.train.epochs = 100
    config.train.batch_size = 8  # images per step of one seed
    config.train.micro_batch_size = 0  # of these at a time, gradients summed; 0: what suits a CPU's caches, on an accelerator all
    config.train.patience = 0  # epochs without a better validation loss after which a seed has ended; 0: every epoch is made
    config.train.learning_rate = 1e-4
    config.train.schedule = "step"  # of the learning rate: step, cosine (to 0 at the end), constant
    config.train.warmup_epochs = 0.0  # over which it first rises from 0; may be a fraction
    config.train.lr_step_epochs = 30  # with step it is multiplied by lr_gamma after each so many epochs
    config.train.lr_gamma = 0.5
    config.train.layer_decay = 1.0  # of the learning rate, for each layer below the classifier
    config.train.weight_decay = 0.05  # on every parameter, as in the study
    config.train.beta1 = 0.9
    config.train.beta2 = 0.999
    config.train.epsilon = 1e-8
    config.train.ema_decay = 0.0  # per step, of the average of the parameters that is then validated and kept; 0: the parameters themselves
    config.train.label_smoothing = 0.0  # share of the target that all classes have alike; of the training loss only, as all of these
    config.train.focal_gamma = 0.0  # of the focal loss: how much less examples count that are right; 0: cross-entropy
    # How much each class counts: none (alike), balanced (more where it is rare), or one number per class.
    config.train.class_weights = ml_collections.FieldReference("none", field_type=object)
    # Of model.views and data with masks: the weight of finding lesions in volumes that have a mask; a decoder does that, in training only.
    config.train.mask_weight = 0.0
    config.train.mixup = 0.0  # alpha of the Beta distribution of the shares in which two images are mixed; 0: none are
    config.train.sampler = "shuffled"  # shuffled: every image once an epoch; balanced: as many images, of all classes alike
    config.train.remat = "auto"  # computed again in the backward pass, to save memory: none, attention, blocks; auto: as little as fits
    config.train.checkpoint_seconds = 60.0  # least time between two checkpoints

    config.augment = ml_collections.ConfigDict()
    config.augment.crop_scale = (0.8, 1.0)  # share of the image's area
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # width / height
    config.augment.rotation_degrees = 15.0  # at most, either way
    config.augment.flip_h = 0.0  # probability of turning the image upside down
    config.augment.flip_w = 0.5  # probability of exchanging left and right
    config.augment.quarter_turns = False  # 0, 90, 180 or 270 degrees
    config.augment.brightness = 0.2  # largest change of a factor around 1
    config.augment.contrast = 0.2

    config.eval = ml_collections.ConfigDict()
    config.eval.batch_size = 64  # images

    config.tracking = ml_collections.ConfigDict()
    config.tracking.writers = ""  # where a run is shown while it trains: tensorboard, wandb, mlflow, or several with commas; empty: nowhere
    config.tracking.project = "vitmed"  # of Weights & Biases; the experiment of MLflow
    config.tracking.name = ""  # of the run there; empty: its folder's

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices over which a batch is split; -1: those that the others leave, as far as they divide the batches
    config.mesh.fsdp = 1  # devices over which parameters and optimiser state are split
    config.mesh.sequence = 1  # devices over which the tokens of an image are split, for long volumes
    return config


def sweep() -> list[dict[str, str]]:
    """The study's patch sizes on the 2D sets with one label per image."""
    datasets = ("pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist")
    return [{"dataset": dataset, "patch": str(patch)} for dataset in datasets for patch in (28, 14, 7, 4, 2, 1)]
