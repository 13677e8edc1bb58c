# SPDX-License-Identifier: MIT
"""keel chat in a terminal: its commands, Ctrl-C and Ctrl-D, and what happens where the context ends."""
import json
import os
import pathlib
import re
import select
import subprocess
import tempfile
import time
import unittest

if os.name != "nt":
    import pty
    import termios

KEEL = os.path.join(os.environ["KEEL_BIN"], "keel")
SMALL = pathlib.Path(__file__).resolve().parents[1] / "data/models/small-q8.gguf"
PATIENCE = 300  # seconds, for a machine that is busy with other things


def too_long(tokens, left):
    return f"the message takes {tokens} tokens, and {left} are left: /undo makes room, --ctx gives more"


class Terminal:
    """A running `keel chat`, exact so that its answers are the same everywhere. The terminal does not echo: all that
    it shows was written by the program."""

    def __init__(self, *arguments):
        self.shown = ""
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            attributes = termios.tcgetattr(0)
            attributes[3] &= ~termios.ECHO
            termios.tcsetattr(0, termios.TCSANOW, attributes)
            os.execv(KEEL, [KEEL, "chat", "--precision", "exact", "--seed", "1", *map(str, arguments)])
        self.welcome = self.until_prompt()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.end)  # hangs up: what still runs ends
        if self.pid:
            os.waitpid(self.pid, 0)

    def wait_for(self, pattern):
        """Reads until what is shown matches; answers the text up to there, which is then done with."""
        pieces, deadline = self.shown.encode("utf-8", "surrogateescape"), time.monotonic() + PATIENCE
        while True:
            text = pieces.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
            found = re.search(pattern, text)
            if found:
                self.shown = text[found.end():]
                return text[:found.start()]
            if not select.select([self.end], [], [], deadline - time.monotonic())[0]:
                raise AssertionError(f"no {pattern!r} in {text!r}")
            try:
                more = os.read(self.end, 4096)
            except OSError:  # what Linux says at the end
                more = b""
            if not more:
                raise AssertionError(f"ended after {text!r}")
            pieces += more

    def until_prompt(self):
        return self.wait_for(r"(\A|\n)> \Z")

    def type(self, text):
        os.write(self.end, text.encode())

    def say(self, line):
        self.type(line + "\n")
        return self.until_prompt()

    def tokens(self):
        """How many there are, and how many were read for the last answer."""
        counts = re.fullmatch(r"(\d+) of (\d+) tokens, (\d+) were read for the last answer", self.say("/tokens"))
        return int(counts[1]), int(counts[3])

    def finish(self):
        """Ctrl-D; answers the exit code."""
        self.type("\x04")
        pid, self.pid = self.pid, 0
        while True:  # whoever leaves needs someone to read what he says
            try:
                if not os.read(self.end, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def turn_length(text, after_answer=True):
    """Tokens of a message, of the head of its answer, and of the end of the answer before it."""
    markers = "<|im_user|>user<|im_middle|>{}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    if after_answer:
        markers = "<|im_end|>" + markers
    done = subprocess.run([KEEL, "tokenize", "--special"], input=markers.format(text).encode(), capture_output=True,
                          check=True)
    return len(json.loads(done.stdout))


@unittest.skipIf(os.name == "nt", "there are no pseudo-terminals")
class Chat(unittest.TestCase):
    def test_later_turns_read_only_what_is_new(self):
        with Terminal("--system", "") as talk:
            self.assertIn("/undo", talk.welcome)
            self.assertEqual(talk.tokens(), (0, 0))
            talk.say("Hello")
            self.assertEqual(talk.tokens()[1], turn_length("Hello", after_answer=False))
            for text in ("What did the dog find?", "Grüße aus 北京 🙂"):
                held = talk.tokens()[0]
                talk.say(text)
                now, read = talk.tokens()
                self.assertEqual(read, turn_length(text))
                self.assertGreaterEqual(now, held + read)
            self.assertEqual(talk.finish(), 0)

    def test_undo_retry_and_edit(self):
        with Terminal() as talk:
            for command in ("/undo", "/retry", "/edit Something"):
                self.assertEqual(talk.say(command), "there is no turn yet")
            talk.say("Tell me a story.")
            one, _ = talk.tokens()
            talk.say("And another one.")
            asked = one + turn_length("And another one.")
            self.assertGreaterEqual(talk.tokens()[0], asked)
            self.assertTrue(talk.say("/retry"))
            now, read = talk.tokens()
            self.assertGreaterEqual(now, asked)
            self.assertLessEqual(read, asked - one)
            talk.say("/edit Why?")
            now, read = talk.tokens()
            self.assertGreaterEqual(now, one + turn_length("Why?"))
            self.assertEqual(read, turn_length("Why?"))
            self.assertEqual(talk.say("/edit"), "/edit needs the new text")
            self.assertEqual(talk.say("/undo"), "")
            self.assertEqual(talk.tokens()[0], one)
            talk.say("/undo")
            self.assertEqual(talk.tokens()[0], 0)
            self.assertEqual(talk.say("/undo"), "there is no turn yet")

    def test_branches(self):
        with Terminal() as talk:
            talk.say("Hello")
            one, _ = talk.tokens()
            self.assertEqual(talk.say("/fork"), "branch 2")
            self.assertEqual(talk.tokens()[0], one)
            talk.say("Go on.")
            two, _ = talk.tokens()
            self.assertEqual(talk.say("/branch 1"), "")
            self.assertEqual(talk.tokens()[0], one)
            self.assertEqual(talk.say("/branch 2"), "")
            self.assertEqual(talk.tokens()[0], two)
            for wrong in ("3", "0", "x", ""):
                self.assertEqual(talk.say(f"/branch {wrong}"), "/branch needs a number from 1 to 2")

    def test_a_saved_conversation_goes_on(self):
        with tempfile.TemporaryDirectory() as folder:
            saved = os.path.join(folder, "a conversation.keel")
            with Terminal() as talk:
                talk.say("Hello")
                held, _ = talk.tokens()
                self.assertEqual(talk.say(f"/save {saved}"), "")
                self.assertIn("/nowhere", talk.say("/save /nowhere/file"))
                talk.say("More")
                self.assertEqual(talk.say(f"/load {saved}"), "")
                self.assertEqual(talk.tokens()[0], held)
            with Terminal() as talk:
                self.assertEqual(talk.say(f"/load {saved}"), "")
                self.assertEqual(talk.tokens()[0], held)
                talk.say("Go on.")
                now, read = talk.tokens()
                self.assertEqual(read, turn_length("Go on."))
                talk.say("/undo")
                self.assertEqual(talk.tokens()[0], held)
                self.assertIn("/nowhere", talk.say("/load /nowhere/file"))
                pathlib.Path(saved).write_bytes(b"something else")
                self.assertIn("conversation.keel", talk.say(f"/load {saved}"))
                self.assertEqual(talk.tokens()[0], held)  # errors change nothing
                for command in ("/save", "/load"):
                    self.assertEqual(talk.say(command), command + " needs a file name")

    def test_what_is_no_command(self):
        with Terminal() as talk:
            self.assertIn("/nonsense is no command", talk.say("/nonsense"))
            self.assertIn("/retry answers again", talk.say("/help"))
            self.assertNotIn("is no command", talk.say("/help"))
            self.assertEqual(talk.say(""), "")
            self.assertEqual(talk.tokens()[0], 0)

    def test_an_answer_ends_where_the_context_is_full(self):
        with Terminal("--ctx", 64, "--system", "") as talk:
            answer, _, told = talk.say("Hello").rpartition("\n")
            self.assertEqual(told, "the context is full: /undo makes room")
            self.assertTrue(answer)
            self.assertEqual(talk.tokens()[0], 64)
            self.assertEqual(talk.say("More"), too_long(turn_length("More"), 0))
            self.assertEqual(talk.tokens()[0], 64)
            talk.say("/retry")
            self.assertEqual(talk.tokens()[0], 64)
            talk.say("/undo")
            self.assertEqual(talk.tokens()[0], 0)
            long = "Grüße aus 北京 " * 20
            self.assertEqual(talk.say(long), too_long(turn_length(long, after_answer=False), 64))
            self.assertEqual(talk.tokens()[0], 0)
            talk.say("Again")
            held, _ = talk.tokens()
            self.assertIn("the message takes", talk.say("/edit " + long))
            self.assertEqual(talk.tokens()[0], held)

    def test_ctrl_c_stops_an_answer(self):
        with Terminal("--backend", "reference") as talk:  # slow, so that there is time to stop it
            talk.type("Hello\n")
            talk.wait_for(r"\S")
            talk.type("\x03")
            talk.until_prompt()
            held, read = talk.tokens()
            self.assertTrue(read < held < 8192)
            talk.type("\x03")  # no answer to stop: nothing happens
            self.assertEqual(talk.tokens()[0], held)
            talk.say("/undo")
            self.assertEqual(talk.tokens()[0], 0)
            self.assertEqual(talk.finish(), 0)

    def test_ctrl_c_stops_a_long_message(self):
        with Terminal("-m", SMALL, "--backend", "reference", "--ctx", 3900) as talk:
            talk.type("1 2 3 4 5 6 7 8 9 " * 200 + "\n")
            talk.wait_for("prefill")  # the bar of what takes long
            talk.type("\x03")
            self.assertIn("stopped, the conversation is as it was", talk.until_prompt())
            self.assertEqual(talk.tokens()[0], 0)

    def test_ctrl_d_ends_it(self):
        with Terminal() as talk:
            self.assertEqual(talk.finish(), 0)


if __name__ == "__main__":
    unittest.main()
