"""Evaluation behind `minisgl eval`: how good is a model on a data set, and the rows behind the number.

    task         a preset, a user's YAML or flags -> Task       what is asked and when an answer is right
    questions    Record -> Row with target, options, examples   on top of the batch runner's row parser
    evaluation   Row -> answers.jsonl                           a batch-runner job: its readers, journal and resume
    scoring      rows of modes choice and ppl -> LLM.score      loglikelihoods instead of text
    remote       rows -> an OpenAI-compatible server            text and loglikelihoods; asking: what both runs share
    grading      answers.jsonl -> samples.jsonl                 one verdict a row (extract, instructions, code)
    metrics      verdicts -> values with standard errors
    results      samples.jsonl and results.json                 the same for every evaluation
    compare      two sets of samples -> a paired test           and which rows flipped
    harness      lm-evaluation-harness on this engine           harness_tasks: its task library; extra `eval`

Answers are kept apart from verdicts: another way to extract or to compare needs no model, only the same command again.
None of these modules parses flags or prints.
"""
