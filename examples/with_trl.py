"""Limbeck's loss inside TRL's SFTTrainer (trl 1.16): data, loop, logging and saving stay TRL's, and only compute_loss changes."""

import torch
from trl import SFTTrainer

from limbeck.batch import Batch
from limbeck.learner import Learner
from limbeck.objectives import CrossEntropy, Logits, Needs
from limbeck.teachers import ModelTeacher


class DistillationTrainer(SFTTrainer):
    """`DistillationTrainer(teacher="a folder or hub name", model=..., args=..., train_dataset=...)`; all else is as in SFTTrainer."""

    def __init__(self, teacher, **settings):
        super().__init__(**settings)
        self.terms = {"ce": CrossEntropy(weight=0.2), "logits": Logits(divergence="forward_kl")}
        scorer = ModelTeacher(model=teacher).open(self.processing_class, Needs(output=True), str(self.args.device))
        learner = Learner(self.model, self.terms, scorer.vocabulary, chunks=8)
        # DDP and FSDP synchronise what runs in the forward that they wrap: so the whole loss does
        self.model.forward = lambda batch, scales: learner(batch, scorer.score(batch), scales)[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        where = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        scored = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero().flatten()
        batch = Batch(ids, where, real.long() - 1, ids, where, scored, ids.flatten()[scored + 1], real.flatten().nonzero().flatten())
        count = len(scored) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        return model(batch=batch, scales={key: term.weight / max(float(count), 1) for key, term in self.terms.items()})
