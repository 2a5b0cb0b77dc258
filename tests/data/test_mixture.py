"""Several data sets in one: fractions to the sample, ids of their own, and what a config may get wrong."""

import json
from collections import Counter

import pytest

from spin.config import SPINConfig, complete, load_config
from spin.core.errors import ConfigError, DataError
from spin.data import MixedPromptDataset, Prompt, PromptDataset, mixed_prompt_dataset
from tests.data.test_read import Letters


def part(size, start=0):
    return PromptDataset([Prompt(f"s{i}", [1, start + i], [2, 0]) for i in range(size)])


def mixture(sizes, weights=None, samples=None):
    return MixedPromptDataset({name: part(size) for name, size in sizes.items()}, weights, samples)


def chosen(dataset, needed, iteration=0, seed=7):
    return [dataset.sample_id(iteration, index) for index in dataset.iteration_samples(needed, seed, iteration)]


def test_without_weights_every_sample_is_played_alike():
    dataset = mixture({"a": 30, "b": 10})
    assert dataset.samples_per_iteration == 40
    assert sorted(chosen(dataset, 40)) == sorted([f"a/s{i}" for i in range(30)] + [f"b/s{i}" for i in range(10)])
    assert dataset.count_sources(chosen(dataset, 20)) == {"a": 15.0, "b": 5.0}


def test_weights_are_fractions_of_an_iteration_to_the_sample():
    """7 : 3. Of 30 and 10 samples, b is used up first: 10 / 0.3 = 33 samples, of which a gives 23.1 and b 9.9."""
    dataset = mixture({"a": 30, "b": 10}, {"a": 0.7, "b": 0.3})
    assert dataset.samples_per_iteration == 33
    assert dataset.count_sources(chosen(dataset, 33)) == {"a": 23.0, "b": 10.0}
    for iteration in range(3):
        ids = chosen(dataset, 20, iteration)
        assert dataset.count_sources(ids) == {"a": 14.0, "b": 6.0} and len(set(ids)) == 20
    assert dataset.count_sources(chosen(dataset, 1)) == {"a": 1.0, "b": 0.0}
    # largest remainder: 3.5 and 1.5 of 5; the first of equal ones gets more
    assert dataset.count_sources(chosen(dataset, 5)) == {"a": 4.0, "b": 1.0}
    # of any sum, and as written: three tenths of 10 are 3, though 0.1 * 3 is a little more
    assert mixture({"a": 9, "b": 3}, {"a": 7, "b": 3}).samples_per_iteration == 10
    assert mixture({"a": 90, "b": 3}, {"a": 0.9, "b": 0.1}).samples_per_iteration == 30


def test_held_out_samples_of_a_mixture_are_those_of_its_sources(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": str(i), "prompt": "a", "response": "x"}) + "\n" for i in range(60)))
    sources = {name: {"source": str(file), "weight": 1} for name in ("a", "b")}
    sources["a"]["validation_fraction"] = 0.2
    dataset = mixed_prompt_dataset(Letters(), sources=sources)
    held_out = set(dataset.held_out.sample_ids)
    assert held_out and all(sample_id.startswith("a/") for sample_id in held_out)
    assert not held_out & set(dataset.sample_ids) and dataset.count_sources(held_out)["b"] == 0
    assert dataset.settings["a.validation_fraction"] == 0.2


def test_the_choice_follows_from_seed_and_iteration():
    dataset, again = (mixture({"a": 50, "b": 50}, {"a": 1, "b": 1}) for _ in range(2))
    assert chosen(dataset, 20, 3) == chosen(again, 20, 3)
    assert set(chosen(dataset, 20, 0)) != set(chosen(dataset, 20, 1))
    assert chosen(dataset, 20, 0, seed=1) != chosen(dataset, 20, 0, seed=2)
    # the sources are mixed within it, not one after the other
    assert 3 < sum(sample_id.startswith("a/") for sample_id in chosen(dataset, 20)[:10]) < 8


def test_a_source_with_too_few_is_repeated_under_ids_of_their_own():
    """Half of 20 from a source of 4: all of it twice, and 2 of a third copy."""
    dataset = mixture({"big": 100, "few": 4}, {"big": 1, "few": 1}, samples=20)
    assert dataset.samples_per_iteration == 20
    ids = chosen(dataset, 20)
    assert len(set(ids)) == 20 and dataset.count_sources(ids) == {"big": 10.0, "few": 10.0}
    copies = Counter(sample_id.partition("#")[2] for sample_id in ids if sample_id.startswith("few/"))
    assert copies == {"": 4, "copy1": 4, "copy2": 2}
    window = dataset.window(0)
    one, two = (window[window.sample_ids.index(f"few/s1{mark}")] for mark in ("", "#copy2"))
    assert (one.prompt_ids, one.real_ids) == (two.prompt_ids, two.real_ids)
    # no copy where the originals are enough
    assert all("#" not in sample_id for sample_id in chosen(dataset, 8))


def test_every_first_part_of_a_validation_set_has_the_fractions():
    dataset = mixture({"a": 60, "b": 20, "c": 20}, {"a": 0.5, "b": 0.3, "c": 0.2})
    for size in (10, 30, 60):
        counts = dataset.count_sources(dataset.sample_ids[:size])
        for name, fraction in {"a": 0.5, "b": 0.3, "c": 0.2}.items():
            assert abs(counts[name] - fraction * size) <= 1


def test_weights_are_distinguished_from_content():
    one, two = (mixture({"a": 9, "b": 9}, weights) for weights in ({"a": 1, "b": 1}, {"a": 2, "b": 1}))
    assert one.content_fingerprint() == two.content_fingerprint() and one.settings != two.settings
    assert one.settings == {"weights": {"a": 0.5, "b": 0.5}, "samples": None}
    other = MixedPromptDataset({"a": part(9), "b": part(9, start=1)}, {"a": 1, "b": 1})
    assert other.content_fingerprint() != one.content_fingerprint()


@pytest.mark.parametrize("weight", [0, -1, True, "x", float("nan"), float("inf")])
def test_weights_that_are_none(weight):
    with pytest.raises(ConfigError, match=r"dataset\.sources\.a\.weight=.*: expected a number above 0"):
        mixture({"a": 2, "b": 2}, {"a": weight, "b": 1})


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 6), ("b", 3)):
        rows = [{"prompt": f"{name}{i}", "response": "long" if i else "r"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}


def test_sources_of_a_config(files):
    dataset = mixed_prompt_dataset(
        Letters(),
        sources={"x": {"source": files["a"], "weight": 2}, "y": {"source": files["b"], "weight": 1, "limit": 2}},
        common={"max_response_tokens": 2, "on_long_response": "cut"},
    )
    assert dataset.samples_per_iteration == 6 and len(dataset) == 8
    assert dataset.report.rows == 8 and dataset.report.counts == {"long_response_cut": 6}
    assert dataset.report.examples[0].startswith(
        "x: a.jsonl:2 (5 tokens), a.jsonl:3 (5 tokens), a.jsonl:4 (5 tokens) and 2 more: the real response is longer "
    )
    assert {"x/a-1", "y/b-2"} < set(dataset.sample_ids)
    assert dataset[dataset.sample_ids.index("y/b-1")].real_ids == [ord("r"), 0]


def test_all_faults_of_the_sources_are_named_at_once(files):
    with pytest.raises(ConfigError) as caught:
        mixed_prompt_dataset(
            Letters(),
            sources={
                "x": {"source": files["a"], "wieght": 1, "weight": 1},
                "y": {"weight": 1},
                "z/2": {"source": files["b"]},
                "s": {"source": files["b"], "weight": 1, "streaming": True},
                "n": 3,
                "w": {"source": files["a"] + "missing.jsonl", "weight": 0},
            },
            common={"weight": 1},
            samples=0,
        )
    text = str(caught.value)
    for words in (
        "dataset.sources.x.wieght: unknown key. Did you mean 'weight'?",
        "dataset.sources.y: has no source.",
        "dataset.sources.z/2: a name has letters, digits",
        "dataset.sources.s.streaming: streams cannot be mixed",
        "dataset.sources.n: found 3, expected arguments",
        "dataset.sources: z/2 without a weight, others with one",
        "9 faults:",
        "dataset.samples=0: expected a whole number above 0",
        "dataset.common.weight: unknown key.",
        "dataset.sources.w.weight=0: expected a number above 0",
    ):
        assert words in text
    with pytest.raises(ConfigError, match="expected a name for each source"):
        mixed_prompt_dataset(Letters(), sources=[{"source": files["a"]}])


@pytest.mark.parametrize("where", ["sources.a", "common"])
@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("limit", 0, "found 0, expected a number from 1 to 1,000,000,000,000."),
        ("limit", "x", "found 'x', expected a whole number or null."),
        ("limit", float("nan"), "found nan, expected a whole number or null."),
        ("shuffle_buffer", -1, "found -1, expected a number from 0 to 1,000,000,000."),
        ("max_prompt_tokens", 2**64, "found 18446744073709551616, expected a number from -9,223,372,036,854,775,808"),
    ],
)
def test_arguments_of_sources_are_checked_like_those_of_one_data_set(key, value, found, where):
    """When the mixture is made, and ranges as soon as its config is read."""
    rows = {"source": [{"prompt": "Q", "response": "A", "limit": 0}]}  # columns of rows are no arguments
    options = {"sources": {"a": rows, "b": rows}, "common": {}}
    assert len(mixed_prompt_dataset(Letters(), **options)) == 2
    options |= {"common": {key: value}} if where == "common" else {"sources": {"a": {**rows, key: value}}}
    with pytest.raises(ConfigError) as caught:
        mixed_prompt_dataset(Letters(), **options)
    assert f"dataset.{where}.{key}: {found}" in str(caught.value)
    if " from " in found:
        cfg = load_config("tests/assets/tiny.yaml", ["output_dir=out"])
        cfg.dataset = cfg.validation_dataset = {"_component_": "spin.data.mixed_prompt_dataset", **options}
        with pytest.raises(ConfigError, match=rf"^2 faults:\n  - dataset\.{where}\.{key}: found") as caught:
            complete(cfg, SPINConfig)
        assert f"- validation_dataset.{where}.{key}: {found}" in str(caught.value)


def test_a_fault_in_a_source_names_it(files):
    with pytest.raises(DataError, match=r"dataset\.sources\.y: dataset\.source=\S+missing\.jsonl does not exist"):
        mixed_prompt_dataset(
            Letters(), sources={"x": {"source": files["a"]}, "y": {"source": files["a"] + "missing.jsonl"}}
        )
