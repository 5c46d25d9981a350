"""MMBench-CN: the questions of MMBench in Chinese.

    python -m llava_sp.eval.mmbench_cn --model M --data D --output O [--split dev|test]

D holds (in D itself or one folder below) mmbench_dev_cn_20231003.tsv or mmbench_test_cn_20231003.tsv; the newer
MMBench_DEV_CN.tsv and MMBench_TEST_CN.tsv are read too. LLaVA's documents put them into the folder mmbench, its script
reads them from mmbench_cn: either does. Everything else is as for `python -m llava_sp.eval.mmbench --help`: rotations,
protocols, the table for the server.

Published for LLaVA-1.5-7B: 58.3. The model is asked for the letter in Chinese, except that lmms-eval's prompt
introduces the options in English. Full-width marks do not count as marks for the rules of VLMEvalKit, which finds no letter in
the Chinese for "the answer is A" either; lmms-eval's rule finds one there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import ClassVar

from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA
from llava_sp.eval.cli import main
from llava_sp.eval.mmbench import MMBench


class MMBenchCN(MMBench):
    name = "mmbench_cn"
    title = "MMBench-CN accuracy in percent, all rotations right"
    published: Mapping[str, float] = {LLAVA15: 58.3, LLAVA15_LORA: 58.9}
    published_on = "dev of 2023-10-03"
    folders = ("mmbench",)
    generations: ClassVar = {**MMBench.generations, "lmms_eval": Generation(max_new_tokens=256)}
    tables: ClassVar = {
        "dev": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "mmbench_dev_cn.tsv"),
        "test": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv", "mmbench_test_cn.tsv"),
    }
    letter_suffix = "\n请直接回答选项字母。"
    lmms_suffix = "\n\n请直接使用所提供的选项字母作为答案回答。"


if __name__ == "__main__":
    sys.exit(main(MMBenchCN))
