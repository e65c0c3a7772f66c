"""From settings to a finished run: the only place where data, a task and optimizers meet."""

from __future__ import annotations

from patchmine.training.detecting import detect as detect
from patchmine.training.extending import extend as extend
from patchmine.training.finetuning import finetune as finetune
from patchmine.training.place import Place as Place
from patchmine.training.place import train_task as train_task
from patchmine.training.pretraining import pretrain as pretrain
from patchmine.training.resuming import resume as resume
from patchmine.training.segmenting import segment as segment
from patchmine.training.shares import compare_shares as compare_shares
