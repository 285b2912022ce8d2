"""A thin `transformers.Trainer`: the paper's loss, logits only where there are labels, evaluation by texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from accelerate import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_prefix.errors import TrainingError
from hf_prefix.sharing.model_card import keeping_text
from hf_prefix.training.base_dropout import BaseDropoutOff
from hf_prefix.training.divergence import FiniteGradients
from hf_prefix.training.facts import training_facts, write_facts
from hf_prefix.training.generation import DecodingSettings
from hf_prefix.training.generation_evaluation import GenerationTask, TextMetrics
from hf_prefix.training.losses import (
    LossReduction,
    accepts_logits_to_keep,
    count_items,
    count_tokens,
    keep_labelled_logits,
    total_items,
)


class PrefixTrainer(Trainer):
    """`transformers.Trainer` with six differences; plain `Trainer` trains a prefix as well.

    1. A decoder-only model computes logits only for the columns that the loss needs. With a short target after a long
       source and a large vocabulary, most of the output layer's work and memory is for positions that it ignores.
    2. The loss is the model's own for each batch, weighted so that a step is a mean over all processes and accumulated
       batches, of target tokens or, as in the original code, of sentences. (`Trainer` passes models a number to divide
       by, which BART, T5 and others ignore: their loss and gradients grow with the number of processes and accumulated
       batches in transformers 5.23.)
    3. The base model's dropout is off in decoder-only models, on in encoder-decoders, as in the original code.
    4. With `decoding`, evaluation generates texts for the prompts of the data and `compute_metrics` gets these.
    5. A loss or gradient that is not finite raises `DivergenceError` before it reaches the parameters, and so does
       a dev loss during training; see `FiniteGradients`.
    6. `training_facts.json` is written beside every prefix that it saves.

    All other arguments, methods and checkpoints are those of `Trainer`.

    Args:
        *args: Those of `Trainer`.
        loss_reduction: What the loss is a mean of: target tokens, or sentences (rows of a batch).
        base_dropout: Whether the base model's dropout is on in training. None: as in the original code.
        decoding: How texts are generated in evaluation. None: no texts, and `compute_metrics` is `Trainer`'s.
        compute_metrics: With `decoding`: a function of `GeneratedTexts`.
        **kwargs: Those of `Trainer`.

    Raises:
        TrainingError: Arguments contradict each other, or one of them cannot be honoured.
    """

    def __init__(
        self,
        *args: Any,
        loss_reduction: LossReduction = "token",
        base_dropout: bool | None = None,
        decoding: DecodingSettings | None = None,
        compute_metrics: TextMetrics | Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_metrics=compute_metrics, **kwargs)
        self.loss_reduction, self.decoding = loss_reduction, decoding
        self._finite, self._dropout_off = FiniteGradients(), BaseDropoutOff()
        self.add_callback(self._finite)
        config = getattr(self._plain_model(), "config", None)
        self._is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if not (self._is_encoder_decoder if base_dropout is None else base_dropout):
            self.add_callback(self._dropout_off)
        # DataParallel would cut a list of columns into one part per device.
        self._can_keep_logits = accepts_logits_to_keep(self._plain_model()) and self.args.n_gpu <= 1
        self._evaluated: Any = None
        self._check()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does.

        Args:
            *args: Those of `Trainer.train`.
            **kwargs: Those of `Trainer.train`.

        Raises:
            DivergenceError: A loss or gradient is not finite.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            self._dropout_off.restore()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss as `Trainer.compute_loss` does.

        Args:
            model: The model, possibly wrapped.
            inputs: The batch.
            return_outputs: Whether the outputs are wanted too; all logits are then computed.
            num_items_in_batch: Target tokens or sentences in the whole accumulated batch. None: of this batch.

        Raises:
            DivergenceError: The model is training and the loss is not finite.
        """
        labels = inputs.get("labels")
        if self.compute_loss_func is not None or not isinstance(labels, Tensor):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            batch = self._completed(inputs) if return_outputs else self._reduced(self._completed(inputs))
            mean, outputs = super().compute_loss(model, batch, True, None)
            loss = mean * self._weight(labels, num_items_in_batch)
            if model.training and not self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # Trainer then divides by it, taking the loss for a mean over one batch.
                loss = loss * self.current_gradient_accumulation_steps
        if model.training:
            self._finite.check_loss(self, loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate a batch as `Trainer.prediction_step` does; where only the loss is wanted, without needless logits.

        Args:
            model: The model, possibly wrapped.
            inputs: The batch.
            prediction_loss_only: Whether only the loss is wanted.
            ignore_keys: Outputs that are left out.
        """
        if not prediction_loss_only or self.compute_loss_func is not None or "labels" not in inputs:
            found: tuple[Tensor | None, Any, Any] = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            return found
        inputs = self._prepare_inputs(inputs)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=items)
        return loss.detach().mean(), None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer.evaluate` does, with the metrics of generated texts where `decoding` is given.

        Args:
            eval_dataset: Encoded pairs, a name among the given data sets, or several by name. None: those given.
            ignore_keys: Outputs that are left out.
            metric_key_prefix: What the names of the metrics begin with.

        Raises:
            DataError: A prompt leaves no room for the text, or there is none.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = cast(dict[str, Any], self.eval_dataset)[data]
        # Before Trainer removes the columns that the model does not take, the references among them.
        self._evaluated = data
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as `Trainer.predict` does; with `decoding`, the predictions are the generated texts.

        Args:
            test_dataset: Encoded pairs.
            *args: Those of `Trainer.predict`.
            **kwargs: Those of `Trainer.predict`.
        """
        self._evaluated = test_dataset
        return super().predict(test_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the loss of each batch and, with `decoding`, generate the texts.

        Args:
            dataloader: Gives the batches.
            description: For the progress bar.
            prediction_loss_only: Whether only the loss is wanted; with `decoding`, logits never are.
            ignore_keys: Outputs that are left out.
            metric_key_prefix: What the names of the metrics begin with.
        """
        loss_only = True if self.decoding is not None else prediction_loss_only
        output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
        if self.decoding is None:
            return output
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        task = GenerationTask.of(self._evaluated, tokenizer, self._is_encoder_decoder)
        with self.compute_loss_context_manager():
            texts = task.run(self._plain_model(), tokenizer, self.decoding)
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.compute_metrics(texts).items()}
        return EvalLoopOutput(texts.predictions, texts.references, (output.metrics or {}) | found, output.num_samples)

    def facts(self) -> dict[str, Any]:
        """Return what a model card needs to know of the training; see `training_facts`."""
        prefix_facts = {
            "loss_reduction": self.loss_reduction,
            "base_dropout": not self._switches_dropout_off(),
            "decoding": None if self.decoding is None else self.decoding.as_json(),
        }
        return training_facts(self) | prefix_facts

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does, and write `training_facts.json` beside it.

        Args:
            output_dir: The folder. None: that of the arguments.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            # First, since what follows may push the folder to the Hub.
            folder.mkdir(parents=True, exist_ok=True)
            write_facts(self.facts(), folder)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Add to the model card as `Trainer.create_model_card` does, but keep what a saved prefix's card says.

        Args:
            *args: Those of `Trainer.create_model_card`.
            **kwargs: Those of `Trainer.create_model_card`.
        """
        if self.is_world_process_zero():
            with keeping_text(Path(self.args.output_dir)):
                super().create_model_card(*args, **kwargs)

    def _get_num_items_in_batch(
        self, batch_samples: Sequence[dict[str, Any]], device: torch.device
    ) -> Tensor | int | None:
        # Trainer's own counts tokens only, and for GPT-2 such too as nothing is predicted for (transformers 5.23).
        if self.compute_loss_func is not None:
            counted: Tensor | int | None = super()._get_num_items_in_batch(list(batch_samples), device)
            return counted
        items = total_items(batch_samples, self.loss_reduction, self._is_encoder_decoder)
        if items is None or not self.args.average_tokens_across_devices or self.args.world_size <= 1:
            return items if items is None else items.to(device)
        # Tensor-parallel processes see the same batch.
        everywhere: Tensor = self.accelerator.gather(items.to(device)).sum() / self.get_tp_size()
        return everywhere

    def _weight(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return what turns the mean over the target tokens of a batch into its share of the loss of a step."""
        tokens = count_tokens(labels, self._is_encoder_decoder)
        if num_items_in_batch is None:
            return tokens / count_items(labels, self.loss_reduction, self._is_encoder_decoder)
        share = tokens / torch.as_tensor(num_items_in_batch, device=labels.device)
        if self.args.average_tokens_across_devices and self.args.n_gpu <= 1:
            # The items were counted over all processes, over which gradients are averaged.
            share = share * (self.accelerator.num_processes // self.get_tp_size())
        return share

    def _completed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the batch, with the decoder's input where label smoothing takes the labels away."""
        smoothing = self.label_smoother is not None and self._is_encoder_decoder
        if not smoothing or "decoder_input_ids" in inputs:
            return dict(inputs)
        model = self._plain_model()
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            raise TrainingError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} needs decoder_input_ids in each batch, "
                f"and {type(base).__name__} does not make them from labels; let the collator add them."
            )
        return inputs | {"decoder_input_ids": shift(labels=inputs["labels"])}

    def _reduced(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch asking for no more logits than the loss needs, where the model lets one ask."""
        return keep_labelled_logits(batch) if self._can_keep_logits and not self.args.use_liger_kernel else batch

    def _plain_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _switches_dropout_off(self) -> bool:
        return self._dropout_off in self.callback_handler.callbacks

    def _check(self) -> None:
        if self.loss_reduction not in get_args(LossReduction):
            raise TrainingError(f"loss_reduction must be 'token' or 'sentence', got {self.loss_reduction!r}.")
        if self.loss_reduction == "sentence" and self.compute_loss_func is not None:
            raise TrainingError(
                "loss_reduction='sentence' and compute_loss_func contradict each other; give one of the two."
            )
        if self.args.push_to_hub and self.args.hub_token:
            raise TrainingError(
                "hub_token would be uploaded for all to read: Trainer saves its arguments in training_args.bin and "
                "pushes that file, too. Leave hub_token out, and log in with 'hf auth login' or set HF_TOKEN."
            )
        if self.decoding is not None:
            self._check_decoding()

    def _check_decoding(self) -> None:
        if self.compute_metrics is None:
            raise TrainingError(
                "decoding is given without compute_metrics, so the texts would be generated for nothing; pass a "
                "function such as lambda t: {'bleu': corpus_bleu(t.predictions, t.references).score}."
            )
        if not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise TrainingError(
                f"decoding needs the base model's tokenizer; pass processing_class=tokenizer, got "
                f"{type(self.processing_class).__name__}."
            )
        if self.args.batch_eval_metrics:
            raise TrainingError("batch_eval_metrics=True and decoding exclude each other: texts are scored together.")
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise TrainingError(
                "decoding generates with the whole model, but FSDP and DeepSpeed split it over processes; evaluate "
                "texts after training, with generate_texts."
            )
