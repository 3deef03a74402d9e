"""The page of examples: which users and lists it shows, and that it names no user."""

import json
from pathlib import Path

import numpy as np
from support.comparisons import with_compare

from cllm4rec.data.documents import Kind
from cllm4rec.experiments.comparison import examples as examples_page
from cllm4rec.experiments.comparison.examples import chosen_users, examples, plain_markdown, shortened, shown_methods
from cllm4rec.experiments.comparison.trial import Data, MethodRun, of_split, read_result
from cllm4rec.metrics.protocol import HeldOut


def test_examples_mark_the_hits_and_name_no_user(comparison_job, comparison):
    summary, _ = comparison_job()
    page = Path(summary["directory"], "examples.md").read_text()
    assert page == examples(
        with_compare(comparison, methods=[]), json.loads(Path(summary["directory"], "metrics.json").read_text())
    )
    assert page.count("## User ") == 5
    assert "user-" not in page
    metrics_header = "|  | CLLM4Rec | EASE | Popularity |"
    assert page.count(metrics_header) == 5
    split = of_split(comparison, 0)
    data = Data.load(split.run.prepared)
    held_out = HeldOut.test(data.histories, comparison.evaluate.read, comparison.evaluate.mask)
    users = chosen_users(held_out.num_train, comparison.seed)
    lists = [read_result(MethodRun(split, name)).ranked[:, :10] for name in ("cllm4rec", "ease", "popularity")]
    hits = sum(np.isin(ranked[row], held_out.relevant[row]).sum() for ranked in lists for row in users)
    assert page.count("**") == 2 * hits > 0
    first = page.split("## User ")[1]
    for item in held_out.relevant[users[0]]:
        assert f"- {data.catalog.item_ids[item]}: " in first


def test_users_of_the_examples_are_spread_over_histories():
    num_train = np.array([9, 1, 8, 2, 7, 3, 6, 4, 5, 5])
    found = num_train[chosen_users(num_train, seed=0)]
    assert found.tolist() == sorted(found)
    groups = [(1, 2), (3, 4), (5, 5), (6, 7), (8, 9)]
    assert all(low <= value <= high for value, (low, high) in zip(found, groups, strict=True))
    assert len(chosen_users(num_train[:3], seed=0)) == 3
    draws = {tuple(chosen_users(num_train, seed)) for seed in range(20)}
    assert len(draws) > 1
    assert chosen_users(num_train, 3).tolist() == chosen_users(num_train, 3).tolist()


def test_the_best_baseline_is_shown_between_the_method_and_popularity():
    results = {name: {"ndcg@100": {"mean": mean}} for name, mean in
               [("popularity", 0.9), ("ease", 0.3), ("ials", 0.4), ("llm_cf", 0.8), ("cllm4rec", 0.1)]}  # fmt: skip
    assert shown_methods(results) == ["cllm4rec", "ials", "popularity"]
    assert shown_methods({"popularity": results["popularity"]}) == ["popularity"]


def test_a_review_stands_in_for_a_text_that_is_missing(comparison_job, comparison, monkeypatch):
    summary, _ = comparison_job()
    metrics = json.loads(Path(summary["directory"], "metrics.json").read_text())
    assert "first training review" not in examples(comparison, metrics)
    load, load_documents = examples_page.Catalog.load, examples_page.load_documents

    def without_texts(directory):
        catalog = load(directory)
        catalog.item_texts = [""] * catalog.num_items
        return catalog

    monkeypatch.setattr(examples_page.Catalog, "load", without_texts)
    page = examples(comparison, metrics)
    assert "Items without a text are shown with their first training review" in page
    assert "“" in page.split("## User 1")[1]
    without_reviews = lambda directory: load_documents(directory).of_kinds([Kind.INTERACTIONS])  # noqa: E731
    monkeypatch.setattr(examples_page, "load_documents", without_reviews)
    assert ": no text" in examples(comparison, metrics)


def test_texts_of_the_data_are_one_line_and_no_markup():
    assert shortened("two\nlines  here") == "two lines here"
    long = shortened("word " * 40)
    assert long.endswith("word …")
    assert len(long) <= examples_page.TEXT_CHARS + 2
    assert shortened("x" * 100) == "x" * examples_page.TEXT_CHARS + " …"
    assert plain_markdown("**a** | <b> [c](d) `e`") == r"\*\*a\*\* \| &lt;b&gt; \[c\](d) \`e\`"
