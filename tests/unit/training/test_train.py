"""Training runs under signals, bad losses, a full disk and full memory; and the checkpoints that they resume from."""

import json
import logging
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from transformers import Trainer, TrainingArguments

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.training.arguments import halved
from llm_engineering.training.processes.ranks import run_lock
from llm_engineering.training.train import rows_text
from llm_engineering.training.trainer.checkpoints import newest_complete, publish
from tests.tiny_models import logged, train, training_setup
from tests.unit.training.steps import interrupt

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SFTConfig(
    learning_rate=1e-2, num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=1,
    save_steps=2, eval_steps=2, logging_steps=1, packing=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def setup(small_llama):
    return training_setup(small_llama, max_length=64)


@pytest.fixture(scope="module")
def data():
    rows = [
        {"id": f"r{i}", "input_ids": [1, *range(20 + i, 28 + i), 0], "labels": [-100] * 4 + [*range(23 + i, 28 + i), 0]}
        for i in range(28)
    ]
    return DatasetDict(train=Dataset.from_list(rows[:24]), validation=Dataset.from_list(rows[24:]))


@pytest.fixture(scope="module")
def whole(data, setup, tmp_path_factory):
    """The result of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Settings.model_config, "env_file", None)
        return train(data, CONFIG, setup, Settings(llm_output_dir=tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_a_checkpoint_and_the_run_resumes(number, whole, data, setup, settings, capfd):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    interrupt(3, lambda: train(data, CONFIG, setup, settings), number)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err
    result = train(data, CONFIG, setup, settings)
    assert result.summary["resumed_from"] == "checkpoint-3"
    adapter = (result.adapter / "adapter_model.safetensors").read_bytes()
    assert (whole.adapter / "adapter_model.safetensors").read_bytes() == adapter
    # The operations before the interruption count too.
    assert result.summary["flops"] == pytest.approx(whole.summary["flops"])
    assert result.summary["flops"] > 0


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"input_ids": [[1], [2]]}, "2 rows"),
        ({"input_ids": [[1]]}, "1 row"),
        ({"input_ids": [[1, 2, 3], [4]], "seq_lengths": [[2, 1], [1]]}, "3 rows, packed into 2,"),
    ],
)
def test_packed_rows_are_named_as_such(columns, text):
    assert rows_text(Dataset.from_dict(columns)) == text


def test_checkpoint_of_another_run_is_refused_with_the_differences(data, setup, settings, tmp_path):
    interrupt(3, lambda: train(data, CONFIG, setup, settings))
    (checkpoint,) = settings.llm_output_dir.glob("training/*/checkpoints/checkpoint-3")
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)

    def resume(data=data, config=CONFIG, setup=setup):
        return train(data, config, setup, settings, resume_from=copy)

    with pytest.raises(RequestError, match="made with another sft.learning_rate, sft.lora.r. Use"):
        resume(config=CONFIG.model_copy(update={"learning_rate": 1e-3, "lora": LoraConfig(r=4)}))
    other = DatasetDict(train=data["train"].select(range(20)), validation=data["validation"])
    with pytest.raises(RequestError, match="made with another dataset.train. Use"):
        resume(data=other)
    with pytest.raises(RequestError, match="made with another model.revision. Use"):
        resume(setup=setup.model_copy(update={"model": setup.model.model_copy(update={"revision": "other"})}))
    shutil.rmtree(checkpoint.parent)
    assert resume().summary["resumed_from"] == "copy"

    (copy / "scheduler.pt").unlink()
    with pytest.raises(RequestError, match="copy is not a complete checkpoint: scheduler.pt is missing or incomplete"):
        resume()


def test_incomplete_checkpoints_are_skipped_with_the_reason(data, setup, settings, caplog):
    interrupt(3, lambda: train(data, CONFIG, setup, settings))
    (complete,) = settings.llm_output_dir.glob("training/*/checkpoints/checkpoint-3")
    folder = complete.parent
    identity = json.loads((complete / "identity.json").read_text())["identity"]
    for number in (4, 5, 6):
        shutil.copytree(complete, folder / f"checkpoint-{number}")
    (folder / "checkpoint-4" / "identity.json").unlink()
    weights = folder / "checkpoint-5" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "checkpoint-6" / "identity.json").write_text("[]")
    (folder / "checkpoint-8").mkdir()
    with caplog.at_level(logging.INFO):
        assert newest_complete(folder, identity) == complete
    for words in (
        "checkpoint-4: it has no identity.json, so another program made it",
        "checkpoint-5: adapter_model.safetensors is missing or incomplete",
        "checkpoint-6: its identity.json has another format",
        "checkpoint-8: it has no identity.json",
    ):
        assert f"Skipping {folder}/{words}" in caplog.text
    # A run does not resume from another run's folder.
    with pytest.raises(RequestError, match="another seed"):
        newest_complete(folder, {**identity, "seed": 8})


def test_publishing_syncs_every_file_before_the_rename(tmp_path, monkeypatch):
    partial = tmp_path / "partial"
    (partial / "ref").mkdir(parents=True)
    (partial / "a").write_text("a")
    (partial / "ref" / "b").write_text("bb")
    synced = []
    real = os.fsync

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(partial, tmp_path / "checkpoint-1", {"seed": 1})
    # The files and their folders are synced under the temporary name, before the rename; the parent folder after it.
    assert set(synced[:-1]) == {str(partial), *(str(partial / p) for p in ("a", "ref/b", "identity.json", "ref"))}
    assert synced[-1] == str(tmp_path)
    described = json.loads((tmp_path / "checkpoint-1" / "identity.json").read_text())
    assert described == {"identity": {"seed": 1}, "files": {"a": 1, "ref/b": 2}}


def test_the_last_loss_is_that_of_the_last_steps_even_if_they_are_not_due(whole, data, setup, settings):
    result = train(data, CONFIG.model_copy(update={"logging_steps": 100}), setup, settings)
    later = logged(whole)[1:]
    assert result.summary["train_loss"] == logged(result)[-1] == pytest.approx(sum(later) / len(later))


def test_row_with_a_nan_loss_stops_the_run_and_is_named(data, setup, settings, monkeypatch):
    broken = data["train"][9]["input_ids"]
    real = Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        ids = inputs["input_ids"][0].tolist()
        if self.model.training and any(ids[i : i + len(broken)] == broken for i in range(len(ids))):
            return loss * float("nan")
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    config = CONFIG.model_copy(update={"per_device_train_batch_size": 2})
    with pytest.raises(WorkError, match=r"Training stopped in step \d+: the loss is nan.*9 \(id r9\)") as stopped:
        train(data, config, setup, settings)
    assert str(stopped.value).count("(id ") == 2


def test_learning_rate_that_explodes_stops_the_run(data, setup, settings):
    # Layer norms keep the logits finite until the weights overflow. In the warm-up's first step the rate is 0.
    config = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(WorkError, match=r"Training stopped in step 3: the loss is nan.*\(id r\d+\)") as stopped:
        train(data, config, setup, settings)
    assert "lower learning_rate" in str(stopped.value)


def test_infinite_gradient_norm_stops_the_run(data, setup, settings, monkeypatch):
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm: torch.tensor(float("inf")))
    with pytest.raises(WorkError, match=r"step 1: the norm of the gradient is inf.*\(id r\d+\)"):
        train(data, CONFIG, setup, settings)


def test_full_disk_ends_the_run_before_a_checkpoint_is_written(data, setup, settings, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = iter([2**40, 2**10])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**41, 2**40, next(free)))
    with pytest.raises(WorkError, match=r"The next checkpoint needs \d+ MiB, and the disk of .* has 0 MiB free"):
        train(data, CONFIG, setup, settings)
    (folder,) = settings.llm_output_dir.glob("training/*/checkpoints")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-2"}
    monkeypatch.undo()
    monkeypatch.setitem(type(settings).model_config, "env_file", None)
    assert train(data, CONFIG, setup, settings).summary["resumed_from"] == "checkpoint-2"


def test_out_of_memory_halves_the_batch_and_keeps_the_effective_one(whole, data, setup, settings, monkeypatch, caplog):
    real = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if int((inputs["position_ids"] == 0).sum()) > 2 and self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with caplog.at_level(logging.INFO):
        result = train(data, CONFIG, setup, settings)
    assert "out of memory with effective batch 4 = 4 per device × 1 accumulated; trying effective batch 4 = 2 per" in (
        caplog.text
    )
    assert (result.summary["per_device_train_batch_size"], result.summary["effective_batch"]) == (2, 4)
    assert result.summary["resumed_from"] == "checkpoint-2"
    assert logged(result) == pytest.approx(logged(whole), abs=1e-4)


def test_out_of_memory_with_one_row_is_an_error(data, setup, settings, monkeypatch):
    def training_step(self, *args, **kwargs):
        self.model.train()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(WorkError, match="Out of memory in training, with one row at a time. Lower formatting.max_len"):
        train(data, CONFIG, setup, settings)


def test_smaller_batches_keep_the_effective_batch():
    nine = CONFIG.model_copy(update={"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2})
    smaller = halved(nine, training=True)
    assert (smaller.per_device_train_batch_size, smaller.gradient_accumulation_steps) == (3, 6)
    evaluated = halved(CONFIG.model_copy(update={"per_device_eval_batch_size": 8}), training=False)
    assert (evaluated.per_device_eval_batch_size, evaluated.per_device_train_batch_size) == (4, 4)


def test_a_run_is_trained_by_one_process_at_a_time(data, setup, settings):
    folder = train(data, CONFIG, setup, settings).adapter.parent
    with run_lock(folder), pytest.raises(RequestError, match="Another process trains the same run"):
        train(data, CONFIG, setup, settings)
    train(data, CONFIG, setup, settings)


def test_fields_of_the_library_reach_its_trainer(data, setup, settings, monkeypatch):
    """A run with values that no key of the recipe has, held to TRL's own arguments."""
    seen = []
    real = trl.SFTConfig

    def recorded(**arguments):
        seen.append(real(**arguments))
        return seen[-1]

    monkeypatch.setattr(trl, "SFTConfig", recorded)
    library = {"warmup_steps": 2, "adam_beta2": 0.9, "neftune_noise_alpha": 5, "load_best_model_at_end": True}
    epochs = {"eval_strategy": "epoch", "eval_steps": None, "save_strategy": "epoch", "save_steps": None}
    config = SFTConfig.model_validate(CONFIG.model_dump(exclude={"load_best"}) | library | epochs)
    result = train(data, config, setup, settings)
    (arguments,) = seen
    given = library | {"eval_strategy": "epoch", "save_strategy": "epoch"}
    assert {name: getattr(arguments, name) for name in given} == given
    rates = [entry["learning_rate"] for entry in result.summary["history"] if "learning_rate" in entry]
    assert rates[1] == pytest.approx(config.learning_rate / 2)
    assert any("eval_loss" in entry for entry in result.summary["history"])


@pytest.mark.parametrize(("steps", "rates"), [(1, [1e-2]), (2, [0.0, 1e-2]), (3, [0.0, 5e-3, 1e-2])])
def test_a_warm_up_as_long_as_the_run_is_cut(steps, rates, data, setup, settings, caplog):
    config = SFTConfig.model_validate(CONFIG.model_dump() | {"max_steps": steps, "warmup_steps": 5})
    history = train(data, config, setup, settings).summary["history"]
    assert [entry["learning_rate"] for entry in history if "learning_rate" in entry] == pytest.approx(rates)
    assert f"it is cut to {steps - 1}" in caplog.text


def test_a_run_that_changes_no_weight_fails(data, setup, settings):
    config = SFTConfig.model_validate(CONFIG.model_dump() | {"max_steps": 2, "learning_rate": 1e-60})
    with pytest.raises(WorkError, match=r"sft trained nothing: after 2 steps .* highest learning rate was 1e-60"):
        train(data, config, setup, settings)


def test_several_visible_cards_do_not_change_a_run_of_one_process(whole, data, setup, settings, monkeypatch):
    real = TrainingArguments.__post_init__

    def with_two_cards(self):
        real(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two_cards)
    two_cards = train(data, CONFIG, setup, settings)
    for name in ("loss", "grad_norm", "step"):
        assert logged(two_cards, name) == logged(whole, name)
