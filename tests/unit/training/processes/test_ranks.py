"""Signals stop a run after a step, and all of its processes after the same one."""

import errno
import os
import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from llm_engineering.training.processes import ranks
from llm_engineering.training.processes.ranks import Interruption


def test_second_signal_stops_at_once():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_ignored_hangup_stays_ignored():
    """`nohup` starts a program with SIGHUP ignored."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.received is None
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_closed_terminal_does_not_break_the_stop(monkeypatch):
    def closed(*_):
        raise OSError(errno.EIO, "Input/output error")

    with Interruption() as interruption, monkeypatch.context() as patch:
        patch.setattr(os, "write", closed)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.received is signal.SIGHUP


def test_a_signal_during_the_agreement_stops_the_next_step(monkeypatch):
    arguments, state, control = TrainingArguments("out", use_cpu=True), TrainerState(max_steps=9), TrainerControl()
    with Interruption() as interruption:

        def maximum(value):
            os.kill(os.getpid(), signal.SIGTERM)
            return value

        with monkeypatch.context() as patches:
            patches.setattr(ranks, "maximum", maximum)
            interruption.on_step_end(arguments, state, control)
        # The other processes have not heard of it, so this one may not stop alone.
        assert not control.should_training_stop
        interruption.on_step_end(arguments, state, control)
        assert control.should_training_stop
        assert interruption.agreed is signal.SIGTERM


def test_no_handler_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
