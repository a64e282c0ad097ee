"""One training run's model, optimizer and data, and its step: Algorithm 1."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from gap_torch import GAPWrapper, RNGState
from gap_torch.consistency import Batch, Method, Outputs, Views, alignment, hard_alignment, logits_of
from gap_torch.losses import MaskedLoss, ce_dice_loss, dice_loss
from segmentation import methods, ranks
from segmentation.errors import InputError
from segmentation.networks.attachments import without_attachment
from segmentation.recipe import HALVINGS, Recipe
from segmentation.task import Pool, Task
from segmentation.training.average import Average, with_statistics_of
from segmentation.training.batches import ShuffledStream, mix
from segmentation.training.captured import CapturedStep
from segmentation.training.inputs import Inputs
from segmentation.training.joint import joint
from segmentation.training.schedules import learning_rate, ramp
from segmentation.training.sgd import SGD

R: dict[str, MaskedLoss] = {"ce_dice": ce_dice_loss, "dice": dice_loss}
"""Of equation 7."""


class Autocast(nn.Module):
    """A network whose forward pass runs under autocast, so that no other code has to think of it."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Outputs:
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.network(images.contiguous(memory_format=channels_last(images.ndim - 2)))


def channels_last(dimensions: int) -> torch.memory_format:
    """Of images in the plane or in space; the faster layout for both networks (docs/performance.md, docs/la.md)."""
    return torch.channels_last if dimensions == 2 else torch.channels_last_3d


class Trainer:
    """Model, optimizer and data of one run, the same on every rank.

    Iteration t draws all its random numbers from (seed, t). A run that was interrupted therefore goes on as if it
    had not been, and runs of different methods see the same batches in the same order (but for UniMatch's unlabelled
    ones, which are twice as large).

    Args:
        task: the data set.
        recipe: what to run.
        labelled: samples with labels to learn from.
        unlabelled: samples of which nothing but the images is looked at.
        device: where to train.
        amp: autocast dtype (bfloat16 or float16), or None for float32.
        compiled: whether `torch.compile` makes the training passes. One process alone; scoring stays eager, since
            volumes come in all sizes.
        graph: whether `compute` is captured as a CUDA graph (`captured`). One process on CUDA alone.

    Raises:
        InputError: PyTorch's gradients are wrong for this size, device and dtype.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        labelled: Pool,
        unlabelled: Pool,
        device: torch.device,
        amp: torch.dtype | None,
        compiled: bool = False,
        graph: bool = False,
    ) -> None:
        refuse_wrong_gradients(recipe, device, amp)
        refuse_joint_gap_on_ranks(recipe)
        self.task, self.recipe, self.own, self.device = task, recipe, recipe.own, device
        self.labelled, self.unlabelled = labelled.to(device), unlabelled.to(device)
        self.statistics_images = self._statistics_images()
        self.labelled_stream = ShuffledStream(len(labelled), recipe.labelled_batch, recipe.seed)
        self.unlabelled_stream = ShuffledStream(
            len(unlabelled), recipe.unlabelled_batch * methods.ENTRIES[recipe.method].draws, recipe.seed + 1
        )

        torch.manual_seed(recipe.seed)
        network = task.network(recipe, methods.attachment(recipe.method, recipe.all_options)).to(device)
        self.model = Autocast(network.to(memory_format=channels_last(len(recipe.size))), amp)
        self.joint = joint(self.model)
        """What the training passes go through; shares its parameters with `model`."""
        if compiled:
            self.joint = cast(nn.Module, torch.compile(self.joint, dynamic=False))
        self.sgd = SGD(self.model.parameters(), recipe)
        self.optimizer = GAPWrapper(self.sgd, recipe.eps, recipe.alpha)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.average = Average(self.model, recipe.average_decay)
        self.weak = task.weak()
        self.method = methods.build(recipe.method, self._setting(), recipe.all_options)
        self.run = CapturedStep(self.compute, device) if graph else self.compute

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of another run, the method's teacher too. To be called before any step."""
        self.model.load_state_dict(weights)
        self.method = methods.build(self.recipe.method, self._setting(), self.recipe.all_options)

    def step(self, iteration: int) -> dict[str, Tensor]:
        """One iteration (Algorithm 1, lines 3-13). Returns what to log, still on the device, until the next one."""
        return self.run(self.inputs(iteration), iteration >= self.recipe.own_warm_up)

    def inputs(self, iteration: int) -> Inputs:
        """What the host decides: samples, crops, the learning rate and the weight, the seed of all else."""
        recipe, progress = self.recipe, iteration / self.recipe.iterations
        weight = self.own.weight * ramp(progress, self.own.ramp_up)
        if self.method is not None:
            weight *= self.method.weight(progress)
        inputs = Inputs(
            *self.labelled_batch(iteration),
            self.unlabelled_batch(iteration),
            # not `torch.tensor`, for which the host would wait
            torch.full((), progress, device=self.device),
            torch.full((), weight, device=self.device),
        )
        # in closed form: a scheduler would count the steps that a GradScaler skips
        self.sgd.set_lr(learning_rate(recipe, iteration))
        torch.manual_seed(mix(recipe.seed, iteration))
        return inputs

    def compute(self, inputs: Inputs, joined: bool) -> dict[str, Tensor]:
        """What the device does with it; returns what to log, which stays there.

        The host looks at no value on the way, so that a CUDA graph can hold all of it.

        Args:
            inputs: of the iteration.
            joined: whether the method has: the warm-up is over.
        """
        method = self.method
        images, labels = self.weak.with_labels(inputs.images, inputs.labels)
        labels = labels.long()
        batch = Batch(inputs.unlabelled, images, labels, inputs.progress)
        views = method.prepare(self.joint, batch) if method is not None and joined else None
        images = images if views is None or views.labelled is None else views.labelled

        values: dict[str, Tensor] = {}
        if views is None or not views.inputs:
            self._refuse_gap_without_views(views)
            loss = self._labelled_loss(self.joint(images), labels, views)
            self.scaler.scale(loss).backward()
        elif self.own.joint:
            loss, values = self._together(views, inputs.weight, images, labels)
        else:
            values = self._consistency(views, inputs.weight)
            loss = self._labelled_loss(self.joint(images), labels, views)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if method is not None:
            method.update(self.model, batch)
        if self.recipe.average_decay:
            self.average.update(self.model)
        return {"loss_labelled": loss.detach(), **values, **({} if method is None else method.logged())}

    def _consistency(self, views: Views, weight: Tensor) -> dict[str, Tensor]:
        """g1, and with GAP alpha * g2 on top of it, into `.grad`."""
        rng = self._rng()
        outputs = self._outputs(views)
        loss = weight * self._method.compare(outputs, views)
        self.scaler.scale(loss).backward()
        values = self._values(loss, views)
        if self.recipe.gap:
            values |= self._perturbed(views, weight, outputs, lambda: self._outputs(views), rng)
        return values

    def _together(
        self, views: Views, weight: Tensor, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same and g_l, where labelled images share a batch with the first view. Returns the labelled loss too."""
        rng = self._rng()
        labelled, outputs = self._joint_outputs(views, images)
        labelled_loss = self._labelled_loss(labelled, labels, views)
        loss = weight * self._method.compare(outputs, views)
        values = self._values(loss, views)
        if self.recipe.gap:
            with self.optimizer.set_aside():
                self.scaler.scale(labelled_loss).backward(retain_graph=True)
            self.scaler.scale(loss).backward()
            values |= self._perturbed(views, weight, outputs, lambda: self._joint_outputs(views, images)[1], rng)
        else:
            self.scaler.scale(labelled_loss + loss).backward()
        return labelled_loss, values

    def _perturbed(
        self,
        views: Views,
        weight: Tensor,
        unperturbed: tuple[Outputs, ...],
        passes: Callable[[], tuple[Outputs, ...]],
        rng: RNGState | None,
    ) -> dict[str, Tensor]:
        """alpha * g2 on top of g1 in `.grad` (Algorithm 1, lines 6-10)."""
        optimizer = self.optimizer
        with optimizer.perturbed(self.joint if self.recipe.freeze_statistics else None, rng=rng):
            loss = self._alignment(views, weight, passes(), unperturbed)
            self.scaler.scale(loss).backward()
        assert optimizer.grad_norm is not None
        scale = self.scaler.scale(torch.ones_like(optimizer.grad_norm))  # on the device, as it is in this step
        return {"loss_perturbed": loss.detach(), "grad_norm": optimizer.grad_norm / scale}

    def _alignment(
        self, views: Views, weight: Tensor, perturbed: tuple[Outputs, ...], unperturbed: tuple[Outputs, ...]
    ) -> Tensor:
        """The loss at theta*, by one of the readings of "aligned before and after perturbation"."""
        if self.recipe.aligned == "targets":
            return weight * self._method.compare(perturbed, views)
        pairs = zip(perturbed, unperturbed, strict=True)
        if self.recipe.aligned == "predictions":
            return weight * torch.stack([alignment(*pair) for pair in pairs]).mean()
        return torch.stack([hard_alignment(*pair, self.recipe.tau, R["ce_dice"]) for pair in pairs]).mean()

    def _outputs(self, views: Views) -> tuple[Outputs, ...]:
        return tuple(map(self._output, views.inputs, _attached(views)))

    def _output(self, images: Tensor, attached: bool) -> Outputs:
        """Of one pass, with what the network's attachment makes, if that is wanted."""
        with nullcontext() if attached else without_attachment(self.joint):
            return self.joint(images)

    def _joint_outputs(self, views: Views, labelled: Tensor) -> tuple[Outputs, tuple[Outputs, ...]]:
        """Of the labelled images, and of the views; the same ones where these are those, or have them in them."""
        count = len(labelled)
        if views.mixed:
            outputs = self._outputs(views)
            return torch.cat([logits_of(output) for output in outputs]), outputs
        if views.labelled_first:
            outputs = self._outputs(views)
            return _rows(outputs[0], slice(count)), outputs
        first, *others = views.inputs
        attached, *others_attached = _attached(views)
        both = self._output(torch.cat([labelled, first]), attached)
        rest = tuple(map(self._output, others, others_attached))
        return _rows(both, slice(count)), (_rows(both, slice(count, None)), *rest)

    def _labelled_loss(self, outputs: Outputs, labels: Tensor, views: Views | None) -> Tensor:
        if self.method is None:
            loss = ce_dice_loss(logits_of(outputs), labels)
        else:
            loss = self.method.labelled_loss(ce_dice_loss, outputs, labels, views)
        return self.own.labelled_weight * loss

    def _values(self, loss: Tensor, views: Views) -> dict[str, Tensor]:
        """What to log of the pass at theta."""
        confident = {} if views.mask is None else {"confident": views.mask.float().mean()}
        return {"loss_unlabelled": loss.detach(), **confident}

    def _rng(self) -> RNGState | None:
        """For the perturbed pass to draw the masks of the first one again."""
        return RNGState.now([self.device] if self.device.type == "cuda" else []) if self.recipe.replay_dropout else None

    def _refuse_gap_without_views(self, views: Views | None) -> None:
        if views is not None and self.recipe.gap:
            raise InputError(f"{self.recipe.name}: without a consistency loss there is nothing to perturb by; no GAP.")

    @property
    def _method(self) -> Method:
        assert self.method is not None
        return self.method

    def _setting(self) -> methods.Setting:
        task, recipe = self.task, self.recipe
        loss = R[self.own.unlabelled_loss]
        return methods.Setting(
            self.model,
            task.weak(),
            task.strong(recipe),
            task.channels,
            len(recipe.size),
            task.num_classes,
            recipe.tau,
            loss,
            self.own.targets,
        )

    def labelled_batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Images and labels of `iteration`, the same for all methods."""
        generator = torch.Generator().manual_seed(mix(self.recipe.seed, iteration))
        return self.labelled.batch(self.labelled_stream[iteration], generator)

    def unlabelled_batch(self, iteration: int) -> Tensor:
        """Images of `iteration`, cut elsewhere than the labelled ones."""
        generator = torch.Generator().manual_seed(mix(self.recipe.seed + 1, iteration))
        return self.unlabelled.image_batch(self.unlabelled_stream[iteration], generator)

    def to_host(self, values: dict[str, Tensor]) -> dict[str, float]:
        """What `step` returned as numbers, and its learning rate; one copy, which waits for the device."""
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        return {**dict(zip(values, numbers, strict=True)), "learning_rate": self.sgd.lr}

    def scored_model(self) -> nn.Module:
        """The weights to validate and to test, as the recipe says."""
        model = self.average.module if self.recipe.average_decay else self.model
        if self.statistics_images is None:
            return model
        batch = self.recipe.labelled_batch + self.recipe.unlabelled_batch
        return with_statistics_of(model, self.statistics_images.split(batch))

    def _statistics_images(self) -> Tensor | None:
        """Randomly chosen ones of all, labelled and unlabelled; None where the running statistics stay."""
        count = self.recipe.statistics_samples
        if not count:
            return None
        generator = torch.Generator().manual_seed(self.recipe.seed)
        order = torch.randperm(len(self.labelled) + len(self.unlabelled), generator=generator)[:count]
        return torch.cat([self._sample(index, generator) for index in order.tolist()])

    def _sample(self, index: int, generator: torch.Generator) -> Tensor:
        """An image of both pools, the labelled ones first, as a batch of one."""
        unlabelled = index - len(self.labelled)
        pool, index = (self.labelled, index) if unlabelled < 0 else (self.unlabelled, unlabelled)
        return pool.image_batch(torch.tensor([index]), generator)

    @property
    def captured(self) -> bool:
        """Whether the step is, or will be after a few iterations, a CUDA graph."""
        return isinstance(self.run, CapturedStep) and not self.run.given_up

    def release(self) -> None:
        """Give back the memory of a captured step."""
        if isinstance(self.run, CapturedStep):
            self.run.forget()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.release()  # a graph works on tensors that have been replaced

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            **({} if self.method is None else {"method": self.method}),
        }


def _rows(outputs: Outputs, rows: slice) -> Outputs:
    """Those of the batch."""
    return outputs[rows] if isinstance(outputs, Tensor) else tuple(output[rows] for output in outputs)


def _attached(views: Views) -> tuple[bool, ...]:
    return (True,) * len(views.inputs) if views.attached is None else views.attached


def refuse_joint_gap_on_ranks(recipe: Recipe) -> None:
    """Raise InputError where a joint pass would go backward twice, of which DistributedDataParallel averages one."""
    if ranks.world() > 1 and recipe.own.joint and recipe.gap:
        raise InputError(
            f"{recipe.name}: a joint pass of labelled and unlabelled images with GAP works in one process alone; "
            "add --no-joint."
        )


def refuse_wrong_gradients(recipe: Recipe, device: torch.device, amp: torch.dtype | None) -> None:
    """Raise InputError where PyTorch's own gradients are wrong.

    In bfloat16 on a CPU (torch 2.6 and 2.15) the weight gradient of a 3x3x3 convolution over an image of which the
    first axis has 2 voxels is partly memory that nobody has written: another one in each run, now and then infinite.
    """
    sides = [recipe.size[0] >> level for level in range(HALVINGS + 1)]
    if len(recipe.size) == 3 and device.type == "cpu" and amp == torch.bfloat16 and 2 in sides:
        raise InputError(
            f"size {recipe.size}: on its way down X comes to 2 voxels, where PyTorch's bfloat16 gradients on a CPU are "
            "wrong; take --amp off."
        )
