"""The batch runner behind `minisgl run`: inputs with prompts in, one output with their answers out.

    sources   files, folders, globs, data sets -> Record     an index, a place for messages, and raw content
    parser    Record -> Row | BadRow                         what is asked (rows: the schema; openai_batch: theirs)
    output    rows that are done already are left out
    feeder    Row -> requests                                in a thread: reads ahead by bursts, renders, tokenizes
    runner    requests -> LLM -> results                     the planner orders each burst, so it is the window
    answers   results -> Line                                one line of JSON, with the row's index and key
    journal   Line -> disk                                   appended at once, fsynced within a second, locked
    output    journal -> .jsonl, .csv, .parquet (tables); stdout and pipes (streams) need none

An unordered .jsonl output is its own journal. Any other file has one beside it, OUT.journal.jsonl, from which it is
written when the last row is there. OUT.manifest.json says what the rows were asked with: only the same command goes
on.

Rows are known by their index, and checked by a key: a hash of the row's content, keyed with a hash of the manifest.
What is remembered of a row that was written is 16 bytes; everything else lives only while the row is in flight.

Each row stands alone: what is wrong with one becomes its error row, and every other row is answered. None of these
modules parses flags or prints.
"""
