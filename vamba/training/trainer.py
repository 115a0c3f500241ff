"""transformers' `Trainer`, and what it lacks: a place in the data, saves that do no harm, a loss that is watched.

What is unusual: a checkpoint is written to `.saving` and renamed when it is whole, so what is called checkpoint-N can
be resumed from, whatever happens while the next one is written. It holds the place in the data of the last batch that
was trained on (not of the last that was prepared), so a resumed run sees the same batches as one that never stopped.
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from vamba.agreement import agreed
from vamba.data import ABOUT, About, ExampleError, Position, TrainingStream
from vamba.errors import DiskFullError, is_disk_full
from vamba.files import publish

from .checkpoints import POSITION_FILE, STAGING, check_best, rotate, write_manifest
from .curves import Curves
from .distillation import Distillation
from .evaluation import EarlyStopping, Evaluation, NonFiniteLossError, Stopped
from .flops import FlopsModel, peak_flops


logger = logging.get_logger(__name__)


class VambaTrainer(Trainer):
    """Trains on a `TrainingStream`.

    Args:
        args: `VambaTrainingArguments`, set up. processing_class: the model's processor.
        stream: where batches come from; what `Trainer` knows of data loading does not apply.
        distillation: a teacher to follow besides the labels.
        evaluation: what `eval_strategy` is about.
        flops: counts the arithmetic of a step, for the MFU in the log.
    """

    control: TrainerControl

    def __init__(
        self,
        *args,
        stream: TrainingStream,
        distillation: Distillation | None = None,
        evaluation: Evaluation | None = None,
        flops: FlopsModel | None = None,
        **kwargs,
    ):
        loss = distillation.loss if distillation is not None else None
        super().__init__(*args, train_dataset=stream, eval_dataset=evaluation, compute_loss_func=loss, **kwargs)
        self.stream, self.distillation, self.flops = stream, distillation, flops
        tflops = self.args.peak_tflops
        self.peak_flops = tflops * 1e12 if tflops else peak_flops(self.args.device)
        self.position = Position(stream, max(1, self.args.dataloader_num_workers))
        self.stopped = False  # by SIGTERM
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience, self.args.early_stopping_threshold))
        if evaluation is not None:
            self.add_callback(Curves())
        self.add_callback(AfterEachStep(self))
        self.save_dtype: torch.dtype | None = None  # of the weights on disk, if not as they are trained
        self._pending: deque[About] = deque()  # batches fetched for the current step, not yet trained on
        self._measured = {"video_tokens": 0.0, "text_tokens": 0.0, "flops": 0.0}
        self._measured_since = time.perf_counter()
        self._staging: Path | None = None
        self._resumed_from: str | None = None

    def train(self, *args, **kwargs):
        """As `Trainer` does; on SIGTERM it finishes the step, saves and stops. Signals reach the main thread only: a
        training in another thread leaves them alone."""
        if threading.current_thread() is not threading.main_thread():
            return super().train(*args, **kwargs)
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            return super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stop(self, number, frame) -> None:
        self.stopped = True

    # --- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.stream)

    def _loader(self, stream: TrainingStream) -> DataLoader:
        arguments = self.args
        return stream.loader(
            arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            worker_init_fn=_outlive_sigterm,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self._pending.clear()
        for batch in batches:
            about = batch.pop(ABOUT)
            if about.error is not None:
                raise ExampleError(about.error)
            for message in about.skipped:
                logger.warning(f"skipped {message}")
            self.position.advance(about)
            self._pending.append(about)
        return batches, self._get_num_items_in_batch(batches, device)

    def set_initial_training_values(self, args, dataloader):
        """As `Trainer` does, which would go on for ever where the data have no length: a run is one epoch of all its
        steps, and nothing is left to train of a run that has done them."""
        epochs, *others = super().set_initial_training_values(args, dataloader)
        return min(epochs, 1), *others

    def _run_epoch(self, *args, **kwargs) -> None:
        """As `Trainer` does, unless a run that goes on is found to have been at its end."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    # --- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._measure(self._pending.popleft())
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "use_cache": False}
        if self.distillation is not None:
            inputs = self.distillation.prepare(inputs)
        else:
            inputs = {**inputs, "skip_logits": True}  # only the loss is wanted
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()} for the samples "
                f"{', '.join(self._pending[0].samples)}; look at them, or lower learning_rate. The checkpoints "
                f"in {self.args.output_dir} are from before."
            )
        return result

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            super().create_optimizer(model)
            if self.args.learning_rates:
                self._split_groups(self.model if model is None else model)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices: no norms, biases, A_log, D, dt_bias or alpha."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def _split_groups(self, model: nn.Module) -> None:
        """Gives the parameters that a pattern names (the first that matches) groups with their own learning rate."""
        given, rates = self.args.learning_rates, {}
        for name, parameter in model.named_parameters():
            rates[id(parameter)] = next((rate for pattern, rate in given.items() if re.search(pattern, name)), None)
        groups = []
        for group in self.optimizer.param_groups:
            for rate in dict.fromkeys(rates[id(parameter)] for parameter in group["params"]):
                members = [parameter for parameter in group["params"] if rates[id(parameter)] == rate]
                groups.append({**group, "params": members, "lr": group["lr"] if rate is None else rate})
        self.optimizer.param_groups[:] = groups

    # --- log --------------------------------------------------------------------------------------------------------

    def _measure(self, about: About) -> None:
        merged = self.processing_class.video_processor.merge_size**2
        for _, _, grids in about.sizes:
            self._measured["video_tokens"] += sum(t * h * w for t, h, w in grids) / merged
        self._measured["text_tokens"] += sum(size.text for size in about.sizes)
        if self.flops is not None:
            self._measured["flops"] += self.flops.step(about.sizes)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate knows no video; ours is in the log as MFU

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # not the summary at the end
            seconds, now = time.perf_counter() - self._measured_since, time.perf_counter()
            counts = self.position.skipped, self.position.rows
            here = torch.tensor([*self._measured.values(), *counts], dtype=torch.float64)
            everywhere = self.accelerator.reduce(here.to(self.args.device, torch.float32)).tolist()
            logs["video_tokens_per_second"] = everywhere[0] / seconds
            logs["text_tokens_per_second"] = everywhere[1] / seconds
            if self.flops is not None and self.peak_flops:
                logs["mfu"] = everywhere[2] / seconds / (self.peak_flops * self.args.world_size)
            logs["skipped_samples"] = int(everywhere[3])
            if self.stream.epoch is None:  # of streamed data, for which Trainer can log no epoch
                logs["seen_samples"] = int(everywhere[4])
            self._measured, self._measured_since = dict.fromkeys(self._measured, 0.0), now
        super().log(logs, start_time)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The metrics of `evaluation`, logged. No random number that training will draw changes.

        Raises:
            Stopped: by SIGTERM. And what `Evaluation.measure` raises.
        """
        began, device = time.perf_counter(), self.args.device
        for part in (self.model, self.optimizer):
            if callable(getattr(part, "eval", None)):  # some optimizers train other weights than they are used with
                part.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.accelerator.autocast():
            torch.manual_seed(self.args.seed)
            evaluation = eval_dataset or self.eval_dataset
            found = evaluation.measure(self.model, self.processing_class, self._loader, lambda: self.stopped)
        seconds = time.perf_counter() - began
        self._measured_since += seconds
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**found, "runtime": seconds}.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict[str, float]:
        """As `Trainer` does; nothing where SIGTERM stops it, or a run that goes on was evaluated when it started."""
        if skip_scheduler and self.state.global_step:
            return {}
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Stopped:
            self.stopped = self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Whether to save with `save_strategy: best`: a better model, or an evaluation that was stopped. What is to be
        loaded at the end is saved in any case."""
        if not metrics:
            return True
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        epochs = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        self._resumed_from = checkpoint
        self._name_best()  # wherever the folder is now
        return epochs

    def make_up_for_evaluation(self) -> None:
        """Does what SIGTERM stopped before the checkpoint was saved that this run goes on from, and saves it anew."""
        control = self.state.stateful_callbacks["TrainerControl"]["args"]
        if self._resumed_from is None or self.eval_dataset is None or not control["should_evaluate"]:
            return
        self._load_rng_state(self._resumed_from)  # to be saved again
        self.control.should_evaluate = self.control.should_save = True
        self._maybe_log_save_evaluate(torch.zeros(()), None, self.model, None, 0, None, 0.0)

    @property
    def _best(self) -> Path | None:
        """The folder of the best checkpoint so far, which need not be there."""
        step = self.state.best_global_step
        return Path(self.args.output_dir) / f"checkpoint-{step}" if step else None

    def _name_best(self) -> None:
        is_this = self.state.best_global_step == self.state.global_step  # which is about to be written
        found = self._best is not None and (is_this or self._best.is_dir())
        self.state.best_model_checkpoint = str(self._best) if found else None

    def _finalize_training(self, *args):
        """As `Trainer` does, which with `save_total_limit: 1` would delete what a stopped run goes on from. The state
        then names the best checkpoint without its folder, as `final` has no absolute paths."""
        if self.args.load_best_model_at_end and self._best is not None and not self.stopped:
            agreed(lambda: check_best(self._best, self.args.save_only_model), decided_by_main=True)
            self.state.best_model_checkpoint = str(self._best)
            self._load_best_model()
        self.state.best_model_checkpoint = None
        result = super()._finalize_training(*args)
        self.state.best_model_checkpoint = self._best and self._best.name
        return result

    def _issue_warnings_after_load(self, load_result) -> None:
        """As `Trainer` does, but not for tied weights, of which one is written and loaded for all."""
        missing = [name for name in load_result.missing_keys if name not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As `Trainer` does, in `save_dtype` if one is set, but for the parameters that the model keeps in float32."""
        if self.save_dtype is not None and self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
            state_dict = dict(model.state_dict() if state_dict is None else state_dict)
            saved: dict[int, torch.Tensor] = {}  # tied weights stay one tensor, of which one is written
            for name, value in state_dict.items():
                if not any(part in name for part in kept):
                    state_dict[name] = saved.setdefault(value.data_ptr(), value.to(self.save_dtype))
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        output = Path(self.args.output_dir)
        final = output / f"checkpoint-{self.state.global_step}"
        self._staging = output / STAGING
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._name_best()  # where it will be
            position = self._staging / final.name / POSITION_FILE.format(rank=self.args.process_index)
            position.write_text(json.dumps(self.position.state()), encoding="utf-8")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(self._staging / final.name / TRAINER_STATE_NAME))
                if not self.args.save_only_model:  # from which nothing can go on
                    write_manifest(self._staging / final.name)
                publish(self._staging / final.name, final)
                rotate(output, self.args.save_total_limit, self.state.global_step, self.state.best_global_step)
            self.accelerator.wait_for_everyone()
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, as it comes
            if not is_disk_full(error, output):
                raise
            kept = any(output.glob("checkpoint-*"))
            rest = f"the earlier checkpoints in {output} are whole" if kept else f"{output} holds no earlier one"
            raise DiskFullError(f"{final.name} could not be written ({error}); {rest}") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None


class AfterEachStep(TrainerCallback):
    """Keeps `epoch` true, and saves and stops after the same step on all processes, whichever got a SIGTERM; what that
    left out is made up for when the run goes on."""

    def __init__(self, trainer: VambaTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.make_up_for_evaluation()

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        stopped, rows = trainer.stopped, trainer.position.rows
        if args.world_size > 1:
            here = torch.tensor([stopped, rows], dtype=torch.float64, device=args.device)
            stopped, rows = trainer.accelerator.reduce(here).tolist()
        trainer.stopped = bool(stopped)
        # Trainer, which knows no length of the data, counts a run as one epoch; of streamed data nobody knows it
        state.epoch = rows / trainer.stream.epoch if trainer.stream.epoch else None
        if trainer.stopped:
            control.should_save = control.should_training_stop = True


def _outlive_sigterm(worker: int) -> None:
    """Ignores a SIGTERM sent to a whole job, as the step under way needs its data, but not one from the process that
    trains: it sends one when it ends in an error, and waits until its workers are gone."""
    trainer = parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(trainer.pid,), daemon=True).start()


def _end_with(process: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != process:
        pass
    os._exit(0)
