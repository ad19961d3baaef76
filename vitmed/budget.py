"""The memory that a planned run takes of a device, and what its backward pass therefore computes again instead of keeping.

Nothing here reads data or weights, and only the arithmetic of `cost` speaks, so that what cannot fit is refused before anything is begun.
"""

import dataclasses
import math

from vitmed import config as config_lib
from vitmed import cost, planning
from vitmed.models import adapters, attention
from vitmed.runs import machine
from vitmed.training import loop, programs, sharding

# On a CPU the process counts as well: the interpreter, its libraries and the compilation (where the C library is not glibc some 300 MB
# more), and a checkpoint, which copies the state twice while it is written.
PROCESS_BYTES, CHECKPOINT_COPIES = 6 * 10**8, 2
LARGEST_BATCH = {"cpu": 32, "other": 256}  # of a prediction: beyond it nothing is gained
COPIES_OF_PARAMETERS = 4  # in the state: parameters, two Adam moments, best parameters; and their average where there is one


def parts(planned: planning.Experiment, device: machine.Device) -> int:
    """Over how many devices a batch is split."""
    config, fsdp = planned.config, max(1, planned.config.mesh.fsdp)
    batch_sizes = (config.train.batch_size, config.eval.batch_size)
    axes = {"data": config.mesh.data, "fsdp": fsdp, "sequence": config.mesh.sequence}
    return fsdp * sharding.data_parts(device.count, **axes, batch_sizes=batch_sizes)


def micro_batches(planned: planning.Experiment, device: machine.Device) -> programs.MicroBatches:
    """Images of a step that go through the model at a time, the config's or with 0 what suits the device, and in how many lanes."""
    train, split = planned.config.train, parts(planned, device)
    return programs.micro_batches(
        device.platform,
        batch_size=train.batch_size,
        num_tokens=planned.num_slices * planned.num_tokens,
        split=split,
        devices=split * max(1, planned.config.mesh.sequence),
        micro_batch_size=train.micro_batch_size,
    )


def micro_batch_size(planned: planning.Experiment, device: machine.Device) -> int:
    """Images of a step that go through the model at a time."""
    return micro_batches(planned, device).micro_batch_size


def remat(planned: planning.Experiment, device: machine.Device, *, images: int | None = None) -> str:
    """One of `vit.REMATS`: the config's, or with `auto` what recomputes least among those that are likely to fit the device.

    Where none is, blocks; where the device does not tell its memory, none. `images` stands for the size of a micro-batch where given.
    """
    asked = planned.config.train.remat
    keeps = planned.attention_form(device.platform) == "plain"
    if asked == "attention" and not keeps:  # what keeps no weights has none to compute again
        return "none"
    if asked != "auto":
        return asked
    options = ("none", "attention", "blocks") if keeps else ("none", "blocks")
    if device.memory_bytes is None:
        return options[0]
    fitting = (option for option in options if _memory(planned, device, option, images).likely <= device.memory_bytes)
    return next(fitting, options[-1])


def memory(planned: planning.Experiment, device: machine.Device, *, images: int | None = None) -> cost.Memory:
    """The bytes that a run takes of each device; on a CPU those of the process. `images` stands for the size of a micro-batch where given.

    The likely bytes of ViT-Ti runs of three seeds on a CPU in 2D were 3 to 4 % above the peak of their processes after 8 and 25 epochs
    (p 7, 28), from equal to 28 % above after one (p 28, 7, 4, 2): 1.3 to 1.9 GB; on a GPU or TPU they have not been measured.
    """
    planned = largest(planned)
    return _memory(planned, device, remat(planned, device, images=images), images)


def largest(planned: planning.Experiment) -> planning.Experiment:
    """The run at that of its patch sizes which has most tokens."""
    return max(planned.forms, key=lambda form: form.num_tokens)


def _memory(planned: planning.Experiment, device: machine.Device, remat: str, images: int | None) -> cost.Memory:
    config, architecture = planned.config, planned.network.architecture
    held = activations(planned, device, adapters.differentiated(planned.tuning, architecture.depth), remat=remat)
    keeps = planned.attention_form(device.platform) == "plain"
    split, sequence = parts(planned, device), max(1, config.mesh.sequence)
    # Of keys and values every device has those of all tokens, kept for each block unless recomputed; of everything else its share.
    blocks = architecture.depth if remat == "none" else 1
    gathered = blocks * 2 * planned.num_tokens * architecture.width if sequence > 1 else 0
    held = cost.Activations(*(math.ceil(numbers / sequence) for numbers in held))
    held = held._replace(linear=held.linear + gathered)
    params, base = (math.ceil(count / max(1, config.mesh.fsdp)) for count in _trained_and_base(planned))
    images = images or micro_batch_size(planned, device)
    whole = config.train.batch_size // split * math.prod(planned.image_size) * config.model.in_channels  # numbers
    waiting = (params + whole) * cost.BYTES_OF_A_PARAMETER if images < config.train.batch_size else 0
    at_once, predicted = max(1, images // split), max(1, config.eval.batch_size // split)
    least, likely = cost.training_memory(
        num_params=params,
        activations=held,
        block_attention_weights=_scores(planned, device, predicted) // predicted,
        num_tokens=math.ceil(planned.num_slices * planned.num_tokens / sequence),
        width=architecture.width,
        batch_size=at_once,
        eval_batch_size=predicted,
        num_runs=len(planned.seeds),
        mapped=device.platform == "cpu",
        scanned=remat != "none",
        averaged=config.train.ema_decay > 0,
        bytes_per_activation=2 if config.model.dtype == "bfloat16" else 4,
        split_bytes=_resident_bytes(planned, device) + base * cost.BYTES_OF_A_PARAMETER,
        waiting_bytes=waiting + (0 if keeps else 2 * cost.BYTES_OF_A_SCORE * _scores(planned, device, at_once)),
    )
    if device.platform == "cpu":
        state = (COPIES_OF_PARAMETERS + (config.train.ema_decay > 0)) * cost.BYTES_OF_A_PARAMETER * params * len(planned.seeds)
        likely += PROCESS_BYTES + CHECKPOINT_COPIES * state + _image_bytes(planned) * sum(planned.description.num_examples.values())
    return cost.Memory(least, likely)


def prediction_batch_size(planned: planning.Experiment, device: machine.Device, *, members: int, method: str = "") -> int:
    """Images that a prediction by so many members takes at a time: a power of two within LARGEST_BATCH, likely to fit half of the device.

    `method`: one of `explain.METHODS` where heat is wanted. InputError where not even one image is likely to fit.
    """
    architecture, at_once = planned.network.architecture, 1 if device.platform == "cpu" else members
    tokens = planned.num_slices * planned.num_tokens
    each = cost.prediction_memory(tokens, architecture.width, _scores(planned, device, 1))
    weights = planned.num_slices * architecture.num_heads * planned.num_tokens**2 * cost.BYTES_OF_A_SCORE  # of one block
    if method == "attention":
        each += 2 * weights
    elif method == "rollout":
        each += 2 * weights * architecture.depth
    elif method == "gradient":  # a backward pass, as `cost.training_memory` counts it
        each += math.ceil(cost.backward_memory(activations(planned, device, architecture.depth)))
    each = at_once * each + _image_bytes(planned)
    most = LARGEST_BATCH["cpu" if device.platform == "cpu" else "other"]
    if device.memory_bytes is None:
        return most
    trained, base = _trained_and_base(planned)
    state = (members * trained + base) * cost.BYTES_OF_A_PARAMETER
    room = device.memory_bytes / 2 - state
    if each > room:
        shown = f"{each / 1e9:,.1f} GB with {tokens:,} tokens, and {device.name} has {max(room, 0) / 1e9:,.1f} GB for it"
        mend = "take --explain=gradient, or none" if method else "predict on a device with more memory"
        raise config_lib.InputError(f"a single image is likely to take {shown}; {mend}")
    return min(most, 2 ** int(math.log2(room / each)))


def activations(planned: planning.Experiment, device: machine.Device, depth: int, *, remat: str = "none") -> cost.Activations:
    """What a backward pass through so many blocks needs kept of an image, or of all slices of a volume."""
    sizes = {name: value for name, value in planned.shape.items() if name != "num_classes"} | {"depth": depth}
    how = {"num_heads": planned.network.architecture.num_heads, "attention": planned.attention_form(device.platform)}
    return cost.Activations(*(planned.num_slices * numbers for numbers in cost.activations_per_example(**sizes, **how, remat=remat)))


def _trained_and_base(planned: planning.Experiment) -> tuple[int, int]:
    """Parameters of each seed and those that all seeds share."""
    return planned.num_trained_params, cost.num_params(**planned.shape | dataclasses.asdict(planned.kept)) if planned.tuning.frozen else 0


def _scores(planned: planning.Experiment, device: machine.Device, images: int) -> int:
    """Attention scores of a block of the network that are there at once, for so many images on a device."""
    heads, num_keys = planned.network.architecture.num_heads, planned.num_tokens
    images *= planned.num_slices
    queries = math.ceil(num_keys / max(1, planned.config.mesh.sequence))
    form = planned.attention_form(device.platform)
    if form == "plain":
        return images * heads * queries * num_keys
    if form == "cudnn" or device.platform == "cpu":  # a CPU takes blocks of attention.CPU_HEADS heads at a time: megabytes
        return 0
    return images * heads * num_keys * min(queries, attention.block_size(batch_size=images, num_heads=heads, num_keys=num_keys))


def _image_bytes(planned: planning.Experiment) -> int:
    """Bytes of one image as it is stored."""
    return math.prod(planned.description.image_size) * planned.description.num_channels


def _resident_bytes(planned: planning.Experiment, device: machine.Device) -> int:
    """Bytes of the training split on the device, as `loop.place` decides; 0 where it is streamed."""
    split = _image_bytes(planned) * planned.description.num_examples["train"]
    tells = device.platform != "cpu" and device.memory_bytes is not None
    limit = loop.RESIDENT_SHARE * device.memory_bytes if tells else loop.RESIDENT_BYTES
    placement = planned.config.data.placement
    return 0 if placement == "host" or (placement == "auto" and split > limit) else split
