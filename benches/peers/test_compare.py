"""What of compare.py needs neither a GPU nor PyTorch: python3 -m unittest discover benches/peers"""

import argparse
import contextlib
import csv
import io
import json
import os
import pathlib
import signal
import sys
import subprocess
import tempfile
import threading
import time
import unittest
from unittest import mock
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import clocks
import compare
import report
import worker
from peers import ON_PROCESSOR, PEERS, environment, quack_rows


def turn_of(script):
    """A turn of a child that runs this."""
    return compare.Turn("child", [sys.executable, "-c", script], {"FROM_PARENT": "7"})


def peer_of(script):
    """The turn of a peer whose process runs this."""
    done = '{"both": 3.0, "forward": 1.0, "both_t": 3.0, "forward_t": 1.0, "t": 1.0}'
    with mock.patch.object(compare, "python", lambda *_: [sys.executable, "-c", f"import os, sys, time\nROUND = '{done}'\n{script}"]):
        return compare.PeerTurn("torch eager", "tensors", 0.0, "expected")


class WithFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = pathlib.Path(folder.name)
        compare.args = argparse.Namespace(
            out=folder.name, patience=30, device="cuda", rounds=3, seconds=None, cce="cce", input=None, shapes=None, tokens=None, dtypes=["bf16"],
            no_sweep=False, softcaps=None, threads=2, peers=[], together=False,
        )
        self.addCleanup(compare.STOPPED.clear)


class Turns(WithFolder):
    def test_a_child_gets_its_environment_and_goes_round_by_round(self):
        turn = turn_of(
            "import os, sys\nprint('noise\\n{not: json}\\n{\"x\": ' + os.environ['FROM_PARENT'] + '}', flush=True)\n"
            "for _ in sys.stdin: print('{\"y\": 1}', flush=True)"
        )
        self.assertEqual(turn.until_json(), {"x": 7})
        for _ in range(2):
            self.assertTrue(turn.go())
            self.assertEqual(turn.until_json(), {"y": 1})
        turn.end()
        self.assertEqual(turn.error, "")

    def test_a_child_that_dies_is_listed_with_its_last_words(self):
        turn = turn_of("raise MemoryError('17 GiB are not there')")
        self.assertIsNone(turn.until_json())
        turn.end()
        self.assertIn("ended with status 1: MemoryError: 17 GiB are not there", turn.error)

    def test_advice_after_an_exception_does_not_hide_it(self):
        turn = turn_of("import sys\nsys.exit('torch.OutOfMemoryError: 9 GiB\\n\\nSet THAT=1 for more.')")
        self.assertIsNone(turn.until_json())
        turn.end()
        self.assertIn("ended with status 1: torch.OutOfMemoryError: 9 GiB", turn.error)

    def test_a_child_that_fails_at_its_end_is_listed(self):
        turn = turn_of("import sys\nprint('{}', flush=True)\nsys.stdin.read()\nsys.exit('no record')")
        self.assertEqual(turn.until_json(), {})
        turn.end()
        self.assertIn("no record", turn.error)

    def test_a_child_that_hangs_is_given_up(self):
        compare.args.patience = 0.5
        began = time.monotonic()
        turn = turn_of("import time\ntime.sleep(60)")
        self.assertIsNone(turn.until_json())
        turn.end()
        self.assertEqual(turn.error, "no answer in 0.5 s")
        self.assertLess(time.monotonic() - began, 20)

    def test_what_a_child_has_started_does_not_outlive_it(self):
        compare.args.patience = 2
        began = time.monotonic()
        turn = turn_of("import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)")
        grandchild = int(next(turn.lines()))
        self.assertIsNone(turn.until_json(), "its output is open as long as the grandchild's")
        self.assertLess(time.monotonic() - began, 20)
        turn.end()
        for _ in range(100):
            time.sleep(0.05)
            try:
                os.kill(grandchild, 0)
                state = pathlib.Path(f"/proc/{grandchild}/stat").read_text().rsplit(")")[-1].split()[0]
            except OSError:
                return
            if state == "Z":  # killed, and nobody has asked after it
                return
        self.fail("it lives")

    def test_a_signal_ends_a_peer_that_is_at_work_and_its_rounds_count(self):
        turn = peer_of("print('{\"threads\": 2}', flush=True)\nsys.stdin.readline()\nprint(ROUND, flush=True)\ntime.sleep(60)")
        turn.prepare()
        turn.ready |= dict.fromkeys(("error_d_e", "error_d_c", "loss", "loss_error", "peak_bytes"), 0)
        self.assertTrue(turn.go())
        turn.round()
        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, compare.stop))
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        began = time.monotonic()
        self.assertTrue(turn.go())
        turn.round()
        self.assertLess(time.monotonic() - began, 20)
        turn.end()
        self.assertTrue(compare.late(), "nothing more is begun")
        (row,) = turn.rows({})
        self.assertEqual((row["both_ms"], row["error"]), (3.0, "after 1 rounds: stopped"))

    def test_a_crash_or_a_hang_at_the_exit_of_a_peer_does_not_undo_its_rounds(self):
        for at_exit in ("os._exit(9)", "time.sleep(60)"):
            turn = peer_of(f"print('{{}}', flush=True)\nsys.stdin.readline()\nprint(ROUND, flush=True)\nsys.stdin.read()\n{at_exit}")
            turn.prepare()
            self.assertTrue(turn.go())
            turn.round()
            began = time.monotonic()
            turn.end()
            self.assertLess(time.monotonic() - began, 20)
            self.assertEqual((turn.error, len(turn.rounds)), ("", 1))

    def test_a_command_that_hangs_is_given_up_and_one_that_fails_says_why(self):
        compare.args.patience = 0.5
        with self.assertRaises(subprocess.TimeoutExpired) as hung:
            compare.call([sys.executable, "-c", "import time; time.sleep(60)"])
        self.assertIn("-c: no answer in 0.5 s", compare.last_line(hung.exception))
        with self.assertRaises(subprocess.CalledProcessError) as failed:
            compare.args.patience = 30
            compare.call([sys.executable, "-c", "import sys; sys.exit('there\\nis no room')"])
        self.assertEqual(compare.last_line(failed.exception), "is no room")
        self.assertEqual(compare.call([sys.executable, "-c", "print(7)"]), "7\n")


class Ours(WithFolder):
    def test_what_was_timed_is_in_the_record_beside_what_was_wrong(self):
        turn = compare.OurTurn.__new__(compare.OurTurn)
        turn.name, turn.error, turn.csv = "ours", "ended with status 2: exact at llama3_8b disagrees", self.out / "cce.csv"
        columns = "method,phase,median_ratio,median_ms,matmul_median_ms,peak_bytes,kept_per_row,loss"
        (self.out / "cce-rounds.csv").write_text("each round")
        turn.csv.write_text(columns + "\nevaluation,forward,1.05,12.6,12.0,1024,0,3.5\n")
        wrong, right = turn.rows({"shape": "tiny"})
        self.assertIn("exact at llama3_8b disagrees", wrong["error"])
        self.assertEqual((right["method"], right["forward_t"], right["error"]), ("ours, evaluation", "1.05", ""))
        self.assertFalse(turn.csv.exists(), "the next shape has its own")
        self.assertTrue((self.out / "cce-rounds-tiny.csv").exists())
        self.assertEqual([row["error"] for row in turn.rows({})], [turn.error])

    def test_cublas_is_that_of_pytorch_where_there_is_one(self):
        (self.out / "nvidia" / "cu13" / "lib").mkdir(parents=True)
        (self.out / "nvidia" / "cu13" / "lib" / "libcublas.so.13").touch()
        with mock.patch.dict(os.environ, {"LD_LIBRARY_PATH": "/before"}), mock.patch.object(sys, "path", [str(self.out)]):
            found = compare.with_cublas()["LD_LIBRARY_PATH"].split(":")
        self.assertEqual(found, [str(self.out / "nvidia" / "cu13" / "lib"), "/before", "/usr/local/cuda/lib64"])

    def test_time_is_over_when_it_was_limited_alone(self):
        self.assertFalse(compare.late())
        compare.args.seconds = 2 * (time.monotonic() - compare.STARTED) + 100
        self.assertFalse(compare.late())
        self.assertTrue(compare.late(1e-9), "of a share of it")
        compare.args.seconds = 0.0
        self.assertTrue(compare.late())

    def test_figures_do_not_depend_on_a_later_run(self):
        rows = [{"method": "ours, exact", "both_ms": "3", "softcap": 0.0}, {"method": "ours, evaluation"}, {"method": "QuACK", "both_ms": 4.0}]
        with mock.patch.object(compare, "our_errors", side_effect=subprocess.TimeoutExpired("cce run", 5)) as run:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                compare.add_our_errors(rows, "tensors", "expected")
        self.assertEqual(run.call_count, 1)
        self.assertIn("ours, exact: errors of gradients not known", said.getvalue())
        self.assertEqual(rows[0], {"method": "ours, exact", "both_ms": "3", "softcap": 0.0})


class Plans(WithFolder):
    def sizes(self):
        return [(shape["shape"], shape["tokens"], shape["softcap"], shape["dtype"]) for shape in compare.plan()]

    def test_a_gpu_gets_large_shapes_and_the_sweep(self):
        self.assertEqual(len(self.sizes()), 4 + 4)
        compare.args.shapes, compare.args.no_sweep = ["gemma2_2b"], True
        self.assertEqual(self.sizes(), [("gemma2_2b", 8192, 0.0, "bf16"), ("gemma2_2b", 8192, 30.0, "bf16")])

    def test_a_processor_gets_those_of_the_figures_in_both_types(self):
        compare.args.device, compare.args.dtypes = "cpu", ["bf16", "f32"]
        shapes, types = [("figure_64k", 2048), ("figure_qwen", 1024)], ["bf16", "f32"]
        self.assertEqual(self.sizes(), [(*shape, 0.0, dtype) for shape in shapes for dtype in types])
        compare.args.tokens, compare.args.dtypes, compare.args.shapes = 256, ["f32"], ["figure_qwen"]
        self.assertEqual(self.sizes(), [("figure_qwen", 256, 0.0, "f32")])
        command = compare.generate_command(compare.plan()[0], "file")
        self.assertEqual(command[:4], ["cce", "generate", "--backend", "cpu"])
        self.assertEqual(command[command.index("--dtype") + 1], "f32")

    def test_a_file_has_its_own_shape_and_type(self):
        header = json.dumps({"embeddings": {"dtype": "F32", "shape": [8, 4]}, "classifier": {"dtype": "F32", "shape": [16, 4]}}).encode()
        file = self.out / "saved.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        compare.args.input, compare.args.softcaps = str(file), [0.0, 30.0]
        self.assertEqual(self.sizes(), [("saved", 8, 0.0, "f32"), ("saved", 8, 30.0, "f32")])

    def test_what_a_processor_runs_is_there(self):
        self.assertLessEqual(set(ON_PROCESSOR), set(PEERS))
        self.assertEqual(environment("Apple CCE tuned", "cuda"), {"CCE_AUTOTUNE": "1"})
        self.assertEqual(environment("torch eager", "cuda"), {})
        self.assertIn("THP_MEM_ALLOC_ENABLE", environment("torch eager", "cpu"))


class Clocks(unittest.TestCase):
    def test_the_processor_tells_what_was_resident_and_is_given_back(self):
        clock, size = clocks.Processor(), 64 << 20
        self.assertGreaterEqual(clock.timed(lambda: time.sleep(0.02)), 20)
        peak = clock.peak(lambda: bytearray(b"x") * size and None)
        if peak is not None:
            self.assertTrue(size * 0.9 < peak < size * 1.5, peak)


class Checks(unittest.TestCase):
    def test_wrong_losses_and_gradients_are_refused_and_nan_is_wrong(self):
        expected, nan = {"loss": 3.0}, float("nan")
        self.assertAlmostEqual(worker.checked(expected, 3.01, 1e-2, 0.1), 0.01)
        for loss, error_e, error_c in [(3.1, 0, 0), (nan, 0, 0), (3.0, 1.0, 0), (3.0, 0, 1.0), (3.0, nan, 0), (3.0, 0, nan)]:
            with self.assertRaises(ArithmeticError, msg=f"{loss} {error_e} {error_c}"):
                worker.checked(expected, loss, error_e, error_c)
        self.assertAlmostEqual(worker.checked(expected, 3.1, 1e-2, 0.1, sixteen_bits=True), 0.1)
        with self.assertRaises(ArithmeticError):
            worker.checked(expected, 3.2, 1e-2, 0.1, sixteen_bits=True)


class Chunks(unittest.TestCase):
    def test_no_chunk_of_quack_has_as_many_rows_as_columns(self):
        self.assertEqual([quack_rows(n, 4096) for n in (1024, 2048, 4096, 8192, 16384)], [4096, 4096, 2048, 4352, 4352])
        self.assertEqual([quack_rows(n, 2304) for n in (2300, 8192, 8192 + 2200)], [2048, 4096, 4352])


class Record(WithFolder):
    def rows(self):
        shape = {"shape": "tiny", "tokens": 8, "vocab": 16, "hidden": 4, "softcap": 30.0, "dtype": "bf16"}
        peer = {
            "error": "", "forward_ms": 14.0, "forward_t": 1.2, "both_t": 3.0, "both_ms": 36.0, "t_ms": 12.0, "peak_bytes": 2**20, "error_d_e": 1e-3,
            "error_d_c": 2e-3, "threads": 2,
        }
        return [
            shape | {"method": "QuACK"} | peer,
            shape | {"method": "Liger & co"} | peer | {"both_t": 4.0, "both_ms": 30.0, "error": "after 3 rounds: lost"},
            shape | {"method": "torch.compile", "error": "ended | with status 1"},
            shape | {"method": "ours, unbiased 2^-10"} | peer | {"both_t": "1.5", "both_ms": "15", "peak_bytes": None},
            shape | {"method": "ours, evaluation", "error": "", "forward_t": "1.05"},
        ]

    def test_table_record_and_chart_have_every_method(self):
        table = report.write(self.rows(), self.out, "cuda")
        self.assertIn("| tiny N=8 V=16 D=4 softcap 30 bf16 | QuACK | 1.20 T | 3.00 T | 36.00 | 1 | 1.0e-03 | 2.0e-03 |", table)
        self.assertIn("| Liger & co (after 3 rounds: lost) | 1.20 T | 4.00 T |", table)
        self.assertIn("| torch.compile | did not run: ended / with status 1 |", table)
        self.assertIn("best peer QuACK 3.00 T; ours, unbiased 2^-10 1.50 T (2.00 times as fast)", table)
        with (self.out / "peers.csv").open() as file:
            self.assertEqual([row["method"] for row in csv.DictReader(file)], [row["method"] for row in self.rows()])
        bars = ElementTree.parse(self.out / "peers.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
        self.assertEqual(len(bars), 1 + 3, "the ground, and what has run")
        self.assertEqual(max(float(bar.get("width")) for bar in bars[1:]), float(bars[-1].get("width")), "the slowest comes last")
        columns = {len(line.split("|")) for line in table.splitlines() if line.startswith("|")}
        self.assertEqual(len(columns), 1, "each line has as many cells")

    def test_on_a_processor_milliseconds_are_compared(self):
        table = report.write(self.rows(), self.out, "cpu")
        self.assertTrue(table.startswith("On the processor; threads of each method: 2."))
        self.assertIn("| QuACK | 14.00 ms | 36.00 ms | 12.00 | 1 |", table)
        self.assertIn("best peer Liger & co 30.00 ms; ours, unbiased 2^-10 15.00 ms (2.00 times as fast)", table)
        self.assertEqual(json.loads((self.out / "chart.json").read_text())["tiny N=8 V=16 D=4 softcap 30 bf16"]["QuACK"], 36.0)


if __name__ == "__main__":
    unittest.main()
