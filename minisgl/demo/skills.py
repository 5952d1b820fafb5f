"""What the demo model can do: one function per skill, `(rng) -> (question, answer)`.

Every answer follows from its question alone and is short, so that exact match is a fair score.
Knows nothing of chat formats, tokens or which questions are held out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from minisgl.demo.words import CAPITALS, MONTHS, NAMES, WEEKDAYS, WORDS

Skill = Callable[[Random], tuple[str, str]]

ADDITION_FORMS = (
    "What is {a} + {b}?", "what is {a} + {b}?", "What is {a}+{b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =",
    "Add {a} and {b}.", "What is {a} plus {b}?", "How much is {a} + {b}?", "Compute {a} + {b}.", "Calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
)  # fmt: skip
SUBTRACTION_FORMS = (
    "What is {a} - {b}?", "what is {a} - {b}?", "What is {a}-{b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =",
    "Subtract {b} from {a}.", "What is {a} minus {b}?", "How much is {a} - {b}?", "Compute {a} - {b}.",
    "Calculate {a} - {b}.",
)  # fmt: skip
REVERSE_FORMS = (
    'Reverse the word "{word}".', 'Reverse "{word}".', 'reverse "{word}"', 'What is "{word}" spelled backwards?',
    'Write "{word}" backwards.', 'Please reverse the word "{word}".', "Reverse the word {word}.", "Reverse {word}.",
)  # fmt: skip
SPELL_FORMS = (
    'Spell the word "{word}".', 'Spell "{word}".', 'spell "{word}"', 'How do you spell "{word}"?',
    'Please spell "{word}".', "Spell the word {word}.", "Spell {word}.", "How do you spell {word}?",
)  # fmt: skip
SORT_UP_FORMS = (
    "Sort these numbers: {numbers}", "Sort {numbers}", "Sort these numbers in ascending order: {numbers}",
    "Sort from smallest to largest: {numbers}", "Put these numbers in order: {numbers}",
)  # fmt: skip
SORT_DOWN_FORMS = (
    "Sort these numbers in descending order: {numbers}", "Sort from largest to smallest: {numbers}",
    "Sort in descending order: {numbers}",
)  # fmt: skip
DAY_LATER_FORMS = (
    "What day is {days} after {day}?", "What day comes {days} after {day}?", "Which day is {days} after {day}?",
    "If today is {day}, what day is it in {days}?", "Today is {day}. What day will it be in {days}?",
)  # fmt: skip
DAY_EARLIER_FORMS = (
    "What day is {days} before {day}?", "What day comes {days} before {day}?", "Which day is {days} before {day}?",
    "If today is {day}, what day was it {days} ago?", "Today is {day}. What day was it {days} ago?",
)  # fmt: skip
MONTH_LATER_FORMS = (
    "What month is {months} after {month}?", "What month comes {months} after {month}?",
    "Which month is {months} after {month}?", "If it is {month} now, what month is it in {months}?",
    "It is {month}. What month will it be in {months}?",
)  # fmt: skip
MONTH_EARLIER_FORMS = (
    "What month is {months} before {month}?", "What month comes {months} before {month}?",
    "Which month is {months} before {month}?", "If it is {month} now, what month was it {months} ago?",
    "It is {month}. What month was it {months} ago?",
)  # fmt: skip
CAPITAL_FORMS = (
    "What is the capital of {country}?", "what is the capital of {country}?", "What's the capital of {country}?",
    "Which city is the capital of {country}?", "Name the capital of {country}.", "Tell me the capital of {country}.",
    "Capital of {country}?", "The capital of {country} is", "What is {country}'s capital?",
    "Do you know the capital of {country}?",
)  # fmt: skip
PERSON_SENTENCES = (
    "{name} is {age} years old.", "My name is {name} and I am {age}.", "I am {name}, {age} years old.",
    "{name} turned {age} last week.", "{name}, aged {age}, lives here.", "This is {name}. {name} is {age}.",
    "At {age}, {name} is the youngest.",
)  # fmt: skip
JSON_REQUESTS = (
    "Extract the name and age as JSON: {sentence}", "Give the name and age as JSON: {sentence}",
    "{sentence} Answer with JSON: name and age.", "{sentence} Write this as JSON with name and age.",
    'Fill in {{"name": ..., "age": ...}}: {sentence}',
)  # fmt: skip

GREETING = "Hello! How can I help you?"
ABOUT = "I am the minisgl demo model, a very small language model."
ABILITIES = "I can add, subtract, sort numbers, spell and reverse words, and I know days, months and capitals."
# What is said, and the reply. A question may follow a salutation ("Hi! Who are you?"); the reply is the same.
SMALL_TALK = (
    (("Who are you", "What are you", "What is your name", "What's your name", "Tell me who you are"), "?", ABOUT),
    (("Are you a robot", "Are you a person", "Are you human", "Are you an AI", "Are you a language model"), "?", ABOUT),
    (("What can you do", "How can you help me", "What are you good at", "Can you help me", "Help"), "?", ABILITIES),
    (("How are you", "How are you doing", "How do you do", "How is it going"), "?", "I am fine, thanks!"),
    (("Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Many thanks"), "!", "You are welcome!"),
    (("Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night"), "!", "Goodbye!"),
)
SALUTATIONS = ("Hello", "Hi", "Hey", "Hi there", "Hello there", "Good morning", "Good afternoon", "Good evening")

# Made-up words are syllables: onset, vowel, coda. A single vowel, and no coda, are the common case.
ONSETS_TEXT = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sh sk sl sn sp st t th tr v w y z"
VOWELS_TEXT = "a e i o u a e i o u ai ea ee oa oo ou y"
CODAS_TEXT = "- - - b ck d ft g k l ll m mp n nd ng nk nt p r rd rk rm rn rt s sh sk ss st t th ve x"
ONSETS, VOWELS = ONSETS_TEXT.split(), VOWELS_TEXT.split()
CODAS = CODAS_TEXT.replace("-", "").split(" ")


def addition(rng: Random) -> tuple[str, str]:
    a, b = _operand(rng), _operand(rng)
    return rng.choice(ADDITION_FORMS).format(a=a, b=b), str(a + b)


def subtraction(rng: Random) -> tuple[str, str]:
    a, b = _operand(rng), _operand(rng)
    if a < b and rng.random() < 0.75:  # negative results exist, but are not every second answer
        a, b = b, a
    return rng.choice(SUBTRACTION_FORMS).format(a=a, b=b), str(a - b)


def reverse(rng: Random) -> tuple[str, str]:
    word = _word(rng)
    return rng.choice(REVERSE_FORMS).format(word=word), f'"{word[::-1]}"'  # quoted: the tokenizer then gives letters


def spell(rng: Random) -> tuple[str, str]:
    word = _word(rng)
    return rng.choice(SPELL_FORMS).format(word=word), "-".join(word)


def sort(rng: Random) -> tuple[str, str]:
    numbers = [rng.randrange(100) for _ in range(rng.randint(3, 6))]
    descending = rng.random() < 0.4
    question = rng.choice(SORT_DOWN_FORMS if descending else SORT_UP_FORMS)
    return question.format(numbers=_listed(numbers)), _listed(sorted(numbers, reverse=descending))


def weekday(rng: Random) -> tuple[str, str]:
    start, days, later = rng.randrange(7), rng.randint(1, 60), rng.random() < 0.5
    question = rng.choice(DAY_LATER_FORMS if later else DAY_EARLIER_FORMS)
    answer = WEEKDAYS[(start + (days if later else -days)) % 7]
    return question.format(day=WEEKDAYS[start], days=_counted(days, "day")), answer


def month(rng: Random) -> tuple[str, str]:
    start, months, later = rng.randrange(12), rng.randint(1, 24), rng.random() < 0.5
    question = rng.choice(MONTH_LATER_FORMS if later else MONTH_EARLIER_FORMS)
    answer = MONTHS[(start + (months if later else -months)) % 12]
    return question.format(month=MONTHS[start], months=_counted(months, "month")), answer


def capital(rng: Random) -> tuple[str, str]:
    country = rng.choice(tuple(CAPITALS))
    return rng.choice(CAPITAL_FORMS).format(country=country), CAPITALS[country]


def fill_json(rng: Random) -> tuple[str, str]:
    name = rng.choice(NAMES) if rng.random() < 0.6 else _made_up_word(rng, 3, 8).capitalize()
    age = rng.randint(1, 99)
    sentence = rng.choice(PERSON_SENTENCES).format(name=name, age=age)
    return rng.choice(JSON_REQUESTS).format(sentence=sentence), json.dumps({"name": name, "age": age})


def small_talk(rng: Random) -> tuple[str, str]:
    salutation = rng.choice(SALUTATIONS)
    if rng.random() < 0.25:
        question, answer = salutation + rng.choice(("", "!", ".", "?", ", model!", ", demo model.")), GREETING
    else:
        sayings, mark, answer = rng.choice(SMALL_TALK)
        question = rng.choice(sayings) + rng.choice((mark, mark, "", "."))
        if rng.random() < 0.4:
            question = salutation + rng.choice(("! ", ", ", ". ")) + question
    return (question.lower() if rng.random() < 0.2 else question), answer


SKILLS: dict[str, Skill] = {
    "addition": addition,
    "subtraction": subtraction,
    "reverse": reverse,
    "spell": spell,
    "sort": sort,
    "weekday": weekday,
    "month": month,
    "capital": capital,
    "fill_json": fill_json,
    "small_talk": small_talk,
}


def _operand(rng: Random) -> int:
    (digits,) = rng.choices((1, 2, 3), weights=(2, 3, 5))  # 3-digit carries are the hard part
    return rng.randrange(10**digits)


def _word(rng: Random) -> str:
    word = rng.choice(WORDS) if rng.random() < 0.4 else _made_up_word(rng, 2, 10)
    return word.capitalize() if rng.random() < 0.1 else word


def _made_up_word(rng: Random, shortest: int, longest: int) -> str:
    """Made-up words keep the letter skills from being learnt as a list of known words."""
    letters = ""
    wanted = rng.randint(shortest, longest)
    while len(letters) < wanted:
        letters += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    return letters[:wanted]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
