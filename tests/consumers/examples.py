# SPDX-License-Identifier: MIT
"""examples.py FOLDER MODEL: the programs of examples/, built in FOLDER, do what they say with MODEL."""
import pathlib
import subprocess
import sys

folder, model = map(pathlib.Path, sys.argv[1:])


def run(name, *arguments, text="", code=0):
    done = subprocess.run([folder / name, *arguments], input=text, capture_output=True, encoding="utf-8",
                          errors="replace", timeout=600)
    assert done.returncode == code, (name, done)
    return done.stdout if code == 0 else done.stderr


def paragraphs(printed):
    """What stands behind a `* ` at the beginning of a paragraph."""
    assert printed.startswith("* "), printed
    return printed[2:].split("\n\n* ")


continuations = paragraphs(run("agents", model, "Once upon a time there was a dog who"))
assert len(continuations) == 8, continuations
assert len(set(continuations)) > 1, continuations  # each has a seed of its own

prompts = ["Once upon a time", "The little girl"]
texts = paragraphs(run("host_threads", model, *prompts))
assert len(texts) == 2, texts
for prompt, text in zip(prompts, texts):
    assert text.startswith(prompt) and len(text) > len(prompt) + 10, texts

# A turn, taken back without a word, and another one.
answers = run("chat", model, text="Hello\n\nHow are you?\n").split("> ")
assert answers[0] == "" and [len(a.strip()) > 0 for a in answers[1:]] == [True, False, True, False], answers

for name in ("agents", "chat", "host_threads"):
    assert "usage: " + name in run(name, code=1)
assert "no-such-file" in run("chat", "no-such-file", code=1)
