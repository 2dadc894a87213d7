"""What becomes of Ctrl-C where a library makes another error of it, or loses it."""

import signal
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import os, signal, sys, time
from contextlib import suppress
from engrid.cli.app import app, main
from engrid.cli.console import report_errors
from engrid.cluster import interrupts

interrupts.AGAIN_SECONDS = 0.2

def press(number):
    os.kill(os.getpid(), number)
    time.sleep(10)

@app.command()
def cut():
    with report_errors():
        {body}

sys.argv = ["engrid", "cut"]
main()
"""


def ended(body, number=signal.SIGINT):
    """The exit code and what was said by a command with this body; `press(number)` is Ctrl-C or SIGTERM."""
    program = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), " " * 8).strip())
    command = [sys.executable, "-c", f"number = {int(number)}\n{program}"]
    done = subprocess.run(command, check=False, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_is_interrupted_ends_with_130_and_says_stopped(number):
    assert ended("press(number)", number) == (130, "", "stopped\n")


def test_interrupt_that_a_library_makes_another_error_of_ends_the_command_as_an_interrupt():
    body = """
    try:
        press(number)
    except KeyboardInterrupt:
        raise TypeError("expected a message argument")
    """
    assert ended(body) == (130, "", "stopped\n")


def test_interrupt_that_a_library_loses_is_raised_again():
    body = """
    with suppress(KeyboardInterrupt):
        press(number)
    print("lost", flush=True)
    time.sleep(10)
    print("never told to stop", flush=True)
    """
    assert ended(body) == (130, "lost\n", "stopped\n")


def test_stopping_is_not_cut_off_by_a_second_interrupt_nor_by_the_first_raised_again():
    body = """
    try:
        press(number)
    finally:
        with interrupts.uninterrupted():
            os.kill(os.getpid(), number)
            time.sleep(0.5)
            print("cleaned up", flush=True)
    """
    assert ended(body) == (130, "cleaned up\n", "stopped\n")


def test_command_that_hangs_after_it_has_cleaned_up_is_interrupted_again():
    body = """
    with suppress(KeyboardInterrupt):
        press(number)
    with interrupts.uninterrupted():
        pass
    time.sleep(10)
    print("never told to stop", flush=True)
    """
    assert ended(body) == (130, "", "stopped\n")


def test_error_without_an_interrupt_is_itself():
    code, _, said = ended("raise TypeError('a defect')")
    assert code == 1
    assert "a defect" in said
