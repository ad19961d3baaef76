"""From a planned run to what the device needs: its network and the recipe of its programs."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from vitmed import budget, checks, planning
from vitmed.models import adapters, attention, build, flexible, inputs, slices, vit
from vitmed.runs import machine
from vitmed.training import optim, programs, sharding, tasks


def build_model(planned: planning.Experiment) -> vit.ViT | slices.SliceViT:
    """The network, computing as suits the devices.

    Neither LoRA nor other patch sizes are in a ViT but in its parameters: it takes what `planned.computed_with` gives.
    """
    model = _vit(planned, planned.encoded)
    return slices_model(planned, model) if planned.views else model


def _vit(planned: planning.Experiment, geometry: checks.Geometry) -> vit.ViT:
    config, device, mesh = planned.config, machine.device(), planned.mesh
    form = planned.attention_form(device.platform)
    local = attention.choose(form, platform=device.platform, num_tokens=planned.num_tokens)
    return build.model(
        planned.network.architecture,
        patch_size=geometry.patch_size,
        kernel_size=geometry.kernel_size,
        num_classes=None if planned.views else planned.description.num_classes,
        drop_path=config.model.drop_path,
        adapter_width=planned.tuning.adapter_width,
        adapter_scale=planned.tuning.adapter_scale,
        dtype=config.model.dtype,
        attention=sharding.attention(mesh, local, num_tokens=planned.num_tokens),
        remat=budget.remat(planned, device),
        token_multiple=mesh.shape["sequence"],
    )


def slices_model(planned: planning.Experiment, encoder: vit.ViT) -> slices.SliceViT:
    """The network of a run with views, around its encoder."""
    return slices.SliceViT(
        encoder=encoder,
        image_size=planned.image_size,
        views=planned.views,
        num_classes=planned.description.num_classes,
        lora=planned.tuning.lora,
        decodes=planned.config.train.mask_weight > 0,
    )


def recipe(planned: planning.Experiment, *, steps_per_epoch: int, labels: np.ndarray | None = None, base: Any = None) -> programs.Recipe:
    """What the device programs are made of, with the `base` of a plugin; of several patch sizes with the recipe of each.

    To train with balanced class weights it needs the `labels` [N, L] of the training split.
    """
    base = jax.tree.map(sharding.put, base or {}, sharding.state(planned.mesh, base or {}, leading=0))
    how = {"steps_per_epoch": steps_per_epoch, "labels": labels, "base": base}
    forms = tuple(_recipe(form, **how) for form in planned.forms) if planned.patch_sizes else ()
    return dataclasses.replace(_recipe(planned, **how), forms=forms, own=planned.own)


def _recipe(planned: planning.Experiment, *, steps_per_epoch: int, labels: np.ndarray | None, base: Any) -> programs.Recipe:
    """The recipe of one patch size, of a `base` that is where it will be used."""
    config, description, network = planned.config, planned.description, planned.network
    device, mesh = machine.device(), planned.mesh
    model, train = build_model(planned), config.train
    apply = flexible.applying(model.apply, **planned.resized) if planned.patch_sizes else model.apply
    return programs.Recipe(
        # Made here: what asks the processes of a run cannot be traced.
        init=functools.partial(_initialise, planned, model if planned.views else _vit(planned, planned.kept)),
        apply=apply if planned.views else adapters.applying(apply, planned.tuning.lora),
        prepare=functools.partial(
            inputs.prepare, in_channels=config.model.in_channels, mean=network.mean, std=network.std, image_size=planned.image_size
        ),
        task=tasks.TASKS[description.task],
        optimizer=optim.adamw(
            learning_rate(planned, steps_per_epoch=steps_per_epoch),
            weight_decay=train.weight_decay,
            beta1=train.beta1,
            beta2=train.beta2,
            epsilon=train.epsilon,
            layer_decay=train.layer_decay,
            depth=network.architecture.depth,
        ),
        augmentation=planned.augmentation,
        seeds=planned.seeds,
        mesh=mesh,
        # One after another on a CPU, where the batched program is slower; together on accelerators, where one run does not fill the device.
        mapped=device.platform == "cpu",
        **budget.micro_batches(planned, device)._asdict(),
        objective=objective(planned, labels),
        mixup=train.mixup,
        mask_weight=train.mask_weight,
        ema_decay=train.ema_decay,
        patience=train.patience,
        tuning=planned.tuning,
        base=base,
    )


def _initialise(planned: planning.Experiment, model: vit.ViT | slices.SliceViT, key: jax.Array) -> Any:
    """Fresh parameters, LoRA's included."""
    if isinstance(model, slices.SliceViT):
        return model.initialise(key, in_channels=planned.config.model.in_channels)
    sizes = {"image_size": planned.kept.image_size, "in_channels": planned.config.model.in_channels}
    params = build.initialise(model, key, **sizes)
    lora = planned.tuning.lora
    return params if lora is None else params | {"lora": adapters.fresh_lora(jax.random.fold_in(key, adapters.KEY), params, lora)}


def learning_rate(planned: planning.Experiment, *, steps_per_epoch: int) -> Any:
    """The schedule: step -> learning rate."""
    train = planned.config.train
    return optim.schedule(
        train.schedule,
        train.learning_rate,
        epochs=train.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=train.warmup_epochs,
        lr_step_epochs=train.lr_step_epochs,
        lr_gamma=train.lr_gamma,
    )


def objective(planned: planning.Experiment, labels: np.ndarray | None) -> tasks.Objective | None:
    """What a step minimises, None for the task's own loss; InputError where the labels [N, L] cannot be balanced."""
    train, description = planned.config.train, planned.description
    task, weights = tasks.TASKS[description.task], None if train.class_weights == "none" else train.class_weights
    if weights == "balanced":
        if labels is None:  # prediction needs no objective
            return tasks.UNKNOWN
        weights = tasks.balanced_weights(task, labels, description.class_names)
    if weights is None and not (train.label_smoothing or train.focal_gamma or train.mixup):
        return None
    shaped = {"label_smoothing": train.label_smoothing, "focal_gamma": train.focal_gamma}
    return tasks.objective(task, num_classes=description.num_classes, class_weights=weights, **shaped)
