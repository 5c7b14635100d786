"""What of compare.py needs no GPU: python3 -m unittest discover benches/peers"""

import argparse
import csv
import os
import pathlib
import sys
import tempfile
import time
import unittest
from unittest import mock
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import compare
from peers import quack_rows


def turn_of(script):
    """A turn of a child that runs this."""
    return compare.Turn("child", [sys.executable, "-c", script], {"FROM_PARENT": "7"})


class WithFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = pathlib.Path(folder.name)
        compare.args = argparse.Namespace(out=folder.name, patience=30, device="cuda", rounds=3)


class Turns(WithFolder):
    def test_a_child_gets_its_environment_and_goes_round_by_round(self):
        turn = turn_of("import os, sys\nprint('noise\\n{not: json}\\n{\"x\": ' + os.environ['FROM_PARENT'] + '}', flush=True)\nfor _ in sys.stdin: print('{\"y\": 1}', flush=True)")
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

    def test_what_the_loader_looked_for_before_comes_first(self):
        (self.out / "nvidia" / "cu13" / "lib").mkdir(parents=True)
        (self.out / "nvidia" / "cu13" / "lib" / "libcublas.so.13").touch()
        with mock.patch.dict(os.environ, {"LD_LIBRARY_PATH": "/before"}), mock.patch.object(sys, "path", [str(self.out)]):
            found = compare.with_cublas()["LD_LIBRARY_PATH"].split(":")
        self.assertEqual(found[0], "/before")
        self.assertIn(str(self.out / "nvidia" / "cu13" / "lib"), found)

    def test_time_is_over_when_it_was_limited_alone(self):
        compare.args.seconds = None
        self.assertFalse(compare.late())
        compare.args.seconds = 0.0
        self.assertTrue(compare.late())


class Checks(unittest.TestCase):
    def test_wrong_losses_and_gradients_are_refused_and_nan_is_wrong(self):
        expected, nan = {"loss": 3.0}, float("nan")
        self.assertAlmostEqual(compare.checked(expected, 3.01, 1e-2, 0.1), 0.01)
        for loss, error_e, error_c in [(3.1, 0, 0), (nan, 0, 0), (3.0, 1.0, 0), (3.0, 0, 1.0), (3.0, nan, 0), (3.0, 0, nan)]:
            with self.assertRaises(ArithmeticError, msg=f"{loss} {error_e} {error_c}"):
                compare.checked(expected, loss, error_e, error_c)


class Chunks(unittest.TestCase):
    def test_no_chunk_of_quack_has_as_many_rows_as_columns(self):
        self.assertEqual([quack_rows(n, 4096) for n in (1024, 2048, 4096, 8192, 16384)], [4096, 4096, 2048, 4352, 4352])
        self.assertEqual([quack_rows(n, 2304) for n in (2300, 8192, 8192 + 2200)], [2048, 4096, 4352])


class Record(WithFolder):
    def rows(self):
        shape = {"shape": "tiny", "tokens": 8, "vocab": 16, "hidden": 4, "softcap": 30.0}
        peer = {"error": "", "forward_t": 1.2, "both_t": 3.0, "both_ms": 36.0, "t_ms": 12.0, "peak_bytes": 2**20, "error_d_e": 1e-3, "error_d_c": 2e-3}
        return [
            shape | {"method": "QuACK"} | peer,
            shape | {"method": "Liger & co"} | peer | {"both_t": 4.0},
            shape | {"method": "torch.compile", "error": "ended | with status 1"},
            shape | {"method": "ours, unbiased 2^-10"} | peer | {"both_t": "1.5"},
            shape | {"method": "ours, evaluation", "error": "", "forward_t": "1.05"},
        ]

    def test_table_record_and_chart_have_every_method(self):
        table = compare.write(self.rows())
        self.assertIn("| tiny N=8 V=16 D=4 softcap 30 | QuACK | 1.20 T | 3.00 T | 36.00 | 1 | 1.0e-03 | 2.0e-03 |", table)
        self.assertIn("did not run: ended / with status 1", table)
        self.assertIn("best peer QuACK 3.00 T; ours, unbiased 2^-10 1.50 T (2.00 times as fast)", table)
        with (self.out / "peers.csv").open() as file:
            self.assertEqual([row["method"] for row in csv.DictReader(file)], [row["method"] for row in self.rows()])
        bars = ElementTree.parse(self.out / "peers.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
        self.assertEqual(len(bars), 1 + 3, "the ground, and what has run")
        self.assertEqual(max(float(bar.get("width")) for bar in bars[1:]), float(bars[-1].get("width")), "the slowest comes last")

    def test_a_rehearsal_says_so(self):
        compare.args.device = "cpu"
        self.assertTrue(compare.write(self.rows()) and (self.out / "peers.md").read_text().startswith("Rehearsed"))


if __name__ == "__main__":
    unittest.main()
