"""What makes L-Diff fast and safe.

Nobody has to read it to understand a Differential Transformer or how one is trained. It imports nothing from the
scripts, model.py or data/.
"""
