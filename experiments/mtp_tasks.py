"""Small tasks whose answers can be checked by running them: arithmetic in steps, and one-line programs.

    prompt "17+25*2="                    completion "17+50=67"           every side must have the prompt's value
    prompt "f(2)=7 f(5)=13 def f(x):"    completion " return 2*x+3"      must give the examples

The check runs nothing but integer arithmetic: it walks the syntax tree and knows +, -, *, whole numbers and x.
"""

import ast
import operator
import random
import re

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
LARGEST = 10**6  # of any intermediate value
LONGEST = 40  # characters of an expression


def evaluate(expression: str, x: int | None = None) -> int:
    """The value of an integer expression of +, -, *, brackets and, if given, x.

    Raises:
        ValueError: for anything else, and for values beyond `LARGEST`.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression of {len(expression)} characters; at most {LONGEST} are evaluated")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} is not an expression") from error

    def value(node) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            found = node.value
        elif isinstance(node, ast.Name) and node.id == "x" and x is not None:
            found = x
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            found = -value(node.operand)
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            found = OPERATORS[type(node.op)](value(node.left), value(node.right))
        else:
            raise ValueError(f"{expression!r} has a {type(node).__name__}; known: +, -, *, whole numbers, x")
        if abs(found) > LARGEST:
            raise ValueError(f"{expression!r} has a value beyond {LARGEST:,}")
        return found

    return value(tree)


def check(prompt: str, completion: str) -> float:
    """1.0 if the completion solves the prompt, else 0.0; found by running it."""
    try:
        if prompt.endswith("def f(x):"):
            body = re.fullmatch(r" return (.+)", completion)
            examples = re.findall(r"f\((-?\d+)\)=(-?\d+)", prompt)
            return float(bool(body and examples) and all(evaluate(body[1], int(x)) == int(y) for x, y in examples))
        wanted = evaluate(prompt.removesuffix("="))
        sides = completion.split("=")
        return float(all(evaluate(side) == wanted for side in sides) and str(wanted) == sides[-1])
    except ValueError:
        return 0.0


def make_task(rng: random.Random) -> tuple[str, str]:
    """(prompt, right completion)"""
    if rng.random() < 0.5:
        a, b, c = rng.randint(1, 20), rng.randint(2, 9), rng.randint(2, 9)
        sign = rng.choice("+-")
        return f"{a}{sign}{b}*{c}=", f"{a}{sign}{b * c}={evaluate(f'{a}{sign}{b * c}')}"
    a, b = rng.randint(2, 5), rng.randint(1, 9)
    first, second = rng.sample(range(1, 8), 2)
    return f"f({first})={a * first + b} f({second})={a * second + b} def f(x):", f" return {a}*x+{b}"


def make_rows(count: int, wrong_share: float, seed: int) -> list[dict]:
    """`count` rows of prompt, completion and checked reward; in about `wrong_share` of them one digit was altered."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, completion = make_task(rng)
        if rng.random() < wrong_share:
            at = rng.choice([i for i, c in enumerate(completion) if c.isdigit()])
            completion = completion[:at] + rng.choice("123456789") + completion[at + 1 :]
        rows.append({"prompt": prompt, "completion": completion, "reward": check(prompt, completion)})
    return rows
