"""Hostile input: files and command lines are corrupted at random, and the outcome is judged.

The only right outcomes are the same result as without the mutation, another result where the mutation makes another valid
input, or a refusal in the words of an error that names the file or the key. `test_hostile.py` tries a few hundred, always
the same ones; `python -m tests.hostile --minutes 30` tries new ones for as long as it is given.
"""
