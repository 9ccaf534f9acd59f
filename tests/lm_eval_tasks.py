"""Small tasks of every kind that lm-eval knows, on disk: task files and their data."""

import json
from random import Random

WORDS = (
    "red",
    "blue",
    "cat",
    "dog",
    "sun",
    "moon",
    "tree",
    "stone",
    "water",
    "fire",
    "bread",
    "wine",
    "king",
    "road",
)

TASKS = {
    "tiny_choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}\\nAnswer:"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{right}}"
        num_fewshot: 2
        fewshot_split: examples
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "tiny_cloze": """
        output_type: loglikelihood
        doc_to_text: "{{question}}"
        doc_to_target: " {{choices[0]}}"
        num_fewshot: 0
        metric_list: [{metric: perplexity}, {metric: acc}]
    """,
    "tiny_text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        num_fewshot: 0
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
    "tiny_writing": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[0]}}"
        num_fewshot: 1
        fewshot_split: examples
        generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
}


def write_tasks(folder, num_items=12, seed=0):
    """The folder, for `include`; every task reads the same `num_items` documents."""
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(seed)
    for split, count in (("test", num_items), ("examples", 4)):
        lines = [json.dumps(_document(random)) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: str(folder / f"{split}.jsonl") for split in ("test", "examples")}
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\ntest_split: test\n"
    for name, settings in TASKS.items():
        own = "\n".join(line.strip() for line in settings.strip().splitlines())
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntag: [tiny]\n{shared}{own}\nmetadata: {{version: 1}}\n"
        )
    return folder


def _document(random):
    question = " ".join(random.choices(WORDS, k=random.randint(3, 9)))
    text = " ".join(random.choices(WORDS, k=random.randint(5, 60)))
    choices = random.sample(WORDS, 3)
    return {"question": question, "choices": choices, "right": random.randrange(3), "text": text}
