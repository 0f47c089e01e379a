import duckdb
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from melbo_ray.errors import UserError
from melbo_ray.runs import queries
from melbo_ray.runs.schema import SCHEMAS
from tests.s3 import environment
from tests.studies import UNSTEERED, kl_of, norm_of, write_part, write_study


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Two runs in one storage: a long one on two concepts, a short one without most tables."""
    storage = tmp_path_factory.mktemp("runs")
    write_study(storage, "long", concepts=("alien", "code"), num_vectors=900, num_prompts=1, samples=1)
    write_study(storage, "short", num_vectors=4, without=("dose", "generations", "geometry"))
    return storage


@pytest.fixture(scope="module")
def db(prefix):
    return queries.connect(str(prefix))


def test_a_prefix_shows_every_run_and_concept(db):
    found = db.sql("SELECT DISTINCT run_id, concept FROM vectors ORDER BY ALL").fetchall()
    assert found == [("long", "alien"), ("long", "code"), ("short", "code")]


def test_a_run_shows_itself_alone(prefix):
    assert queries.connect(str(prefix / "short")).sql("SELECT DISTINCT run_id FROM kl").fetchall() == [("short",)]


@pytest.mark.parametrize("table", SCHEMAS)
def test_every_table_has_the_columns_of_the_contract_written_or_not(prefix, table):
    described = queries.connect(str(prefix / "short")).sql(f"DESCRIBE {table}").fetchall()
    assert [row[0] for row in described] == [*SCHEMAS[table].names, "concept"]
    empty = duckdb.from_arrow(SCHEMAS[table].empty_table())
    assert [row[1] for row in described] == [*map(str, empty.types), "VARCHAR"]


@pytest.mark.parametrize("name", queries.EXAMPLES)
def test_examples_run_where_nothing_was_measured(tmp_path, name):
    write_study(tmp_path, without=SCHEMAS)
    assert queries.connect(str(tmp_path)).sql(queries.EXAMPLES[name]).fetchall() == []


def test_moving_average_is_that_of_numpy_over_50_vectors(db):
    rows = db.sql(queries.EXAMPLES["kl_against_n"]).fetchnumpy()
    code = (rows["run_id"] == "long") & (rows["concept"] == "code")
    kl = np.array([kl_of(n, 900) for n in range(1, 901)])
    assert np.allclose(rows["kl_from_base"][code], kl, rtol=1e-6)
    assert np.allclose(rows["moving_average"][code][25:-24], np.convolve(kl, np.ones(50) / 50, "valid"), rtol=1e-6)


def test_a_vector_whose_kl_is_nan_leaves_its_neighbours_average(tmp_path):
    run = write_study(tmp_path, num_vectors=3, without=["kl"])
    rows = [
        {"kind": "chain", "scale": "own", "index": n, "kl_from_base": k} for n, k in [(1, 1.0), (2, np.nan), (3, 3)]
    ]
    write_part(run, "kl", "code", rows)
    rows = queries.connect(str(run)).sql(queries.EXAMPLES["kl_against_n"]).fetchnumpy()
    assert rows["moving_average"].tolist() == [2, 2, 2]


def test_vectors_under_the_threshold_are_counted(db):
    kl = np.array([kl_of(n, 900) for n in range(1, 901)])
    expected = (900, int((kl < 0.1 * UNSTEERED).sum()), int((kl < 0.5 * UNSTEERED).sum()))
    rows = {row[:2]: row[2:] for row in db.sql(queries.EXAMPLES["vectors_under_threshold"]).fetchall()}
    assert rows["long", "alien"] == rows["long", "code"] == expected
    assert rows["short", "code"][0] == 4


def test_texts_of_the_three_vectors_of_the_post(db):
    rows = db.sql(queries.EXAMPLES["texts"]).fetchall()
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        (concept, n, f"{concept} {n} prompt_0 0") for concept in ("alien", "code") for n in (14, 129, 893)
    ]


def test_generalising_vectors_come_first(db):
    rows = db.sql(queries.EXAMPLES["generalising_vectors"]).fetchnumpy()
    long = rows["n"][(rows["run_id"] == "long") & (rows["concept"] == "code")]
    share = rows["share_of_prompts"][(rows["run_id"] == "long") & (rows["concept"] == "code")]
    assert long[0] == 1
    assert share.sum() == sum(kl_of(n, 900) < 1 for n in range(1, 901))


def test_dose_response_is_the_median_at_each_dose(db):
    rows = db.sql(f"FROM ({queries.EXAMPLES['dose_response']}) WHERE concept = 'alien' AND kind = 'chain'").fetchnumpy()
    doses = [(0.5, 1.0), (1.0, 0.0), (1.5, 1.0), (2.0, 2.0)]  # α, and what it adds to the KL
    pairs = [(np.float32(a * norm_of(n, 900)), add + kl_of(n, 900)) for n in range(1, 901) for a, add in doses]
    at_6 = [kl for norm, kl in pairs if round(float(norm), 1) == 6.0]
    here = rows["at_norm"].round(1) == 6.0
    assert rows["directions"][here] == [len(at_6)]
    assert rows["median_kl"][here] == pytest.approx([np.median(at_6)], rel=1e-6)


def test_a_vectors_presence_is_ranked_among_random_directions_on_both_sides(tmp_path):
    run = write_study(tmp_path, num_vectors=0, without=["presence"])
    aurocs = {"chain": [0.5, 0.56, 0.36, 0.9], "base": [0.05], "random": [0.45, 0.53, 0.6, 0.35]}
    rows = [
        {"kind": kind, "index": n, "texts": "concept", "sinks": sinks, "auroc": value if sinks == "dropped" else 0.5}
        for kind, values in aurocs.items()
        for n, value in enumerate(values, 1)
        for sinks in ("kept", "dropped")
    ]
    write_part(run, "presence", "code", rows)
    found = queries.connect(str(run)).sql(queries.EXAMPLES["presence_p_values"]).fetchall()
    # Away from chance are random directions by 0.03, 0.05, 0.1, 0.15; the vectors by 0, 0.06, 0.14, 0.4 and 0.45.
    expected = {("chain", 1): 1, ("chain", 2): 3 / 5, ("chain", 3): 2 / 5, ("chain", 4): 1 / 5, ("base", 1): 1 / 5}
    assert {row[3:5]: row[6] for row in found} == pytest.approx(expected)
    assert {row[7] for row in found} == {4}


def test_p_values_of_directions_like_the_random_ones_are_uniform(tmp_path):
    run, draws = write_study(tmp_path, num_vectors=0, without=["presence"]), np.random.default_rng(0)
    rows = [
        {"kind": kind, "index": n, "texts": "concept", "sinks": "dropped", "auroc": 0.5 + draws.normal() / 10}
        for kind in ("chain", "random")
        for n in range(1, 400)
    ]
    write_part(run, "presence", "code", rows)
    found = queries.connect(str(run)).sql(queries.EXAMPLES["presence_p_values"]).fetchnumpy()["p_value"]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_plain_sql_over_the_folder_gives_the_same_rows(prefix, db):
    plain = f"SELECT index, kl_from_base FROM '{prefix}/*/kl/**/*.parquet' WHERE kind = 'chain' ORDER BY ALL"
    ours = "SELECT index, kl_from_base FROM kl WHERE kind = 'chain' ORDER BY ALL"
    assert duckdb.sql(plain).fetchall() == db.sql(ours).fetchall()


def test_names_that_look_like_patterns_and_partitions_are_names(tmp_path):
    storage = tmp_path / "date=2026" / "run*s"
    write_study(storage, "a[1]'?", concepts=("007",))
    write_study(storage, "a1'x")
    assert queries.connect(str(storage / "a[1]'?")).sql("SELECT DISTINCT run_id, concept FROM kl").fetchall() == [
        ("a[1]'?", "007")
    ]


def test_parts_being_written_are_not_read(tmp_path):
    run = write_study(tmp_path)
    (run / "kl" / "concept=code" / ".part-1.parquet").write_bytes(b"half a fi")
    assert queries.connect(str(run)).sql("SELECT count(*) FROM kl WHERE kind = 'chain'").fetchall() == [(40,)]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def _break_footer(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:-200] + b"\xff" * 150 + raw[-50:])


def _other_version(path):
    part = pq.ParquetFile(path).read()
    pq.write_table(part.replace_schema_metadata({"schema_version": "99"}), path)


def _other_columns(path):
    part = pq.ParquetFile(path).read()
    names = ["kl" if name == "kl_to_base" else name for name in part.schema.names]
    pq.write_table(part.rename_columns(names).replace_schema_metadata(part.schema.metadata), path)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_truncate, "not a whole Parquet file"),
        (_break_footer, "not a whole Parquet file"),
        (lambda path: path.write_bytes(b""), "not a whole Parquet file"),
        (_other_version, "schema version 99"),
        (_other_columns, "columns kl, kl_to_base"),
    ],
)
def test_a_part_that_cannot_be_right_is_named_in_one_line(tmp_path, spoil, complaint):
    part = write_study(tmp_path) / "kl" / "concept=code" / "part-0.parquet"
    spoil(part)
    with pytest.raises(UserError, match=complaint) as caught:
        queries.connect(str(tmp_path))
    assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["{}/nowhere", "{}", "nosuch://bucket/x", "sftp://me:hunter2@127.0.0.1:1/x"])
def test_where_there_is_no_run_one_line_says_so_without_the_password(tmp_path, place):
    with pytest.raises(UserError) as caught:
        queries.connect(place.format(tmp_path))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_object_storage_answers_as_the_local_files_do(server, prefix):
    with environment(server.environment):
        fsspec.filesystem("s3").put(str(prefix), "bucket/studies", recursive=True)
        ours, local = queries.connect("s3://bucket/studies"), queries.connect(str(prefix))
        for sql in queries.EXAMPLES.values():
            assert ours.sql(sql).fetchall() == local.sql(sql).fetchall()


@pytest.mark.parametrize("place", ["s3://bucket/studies", "s3://absent/studies"])
def test_refused_by_object_storage_is_one_line_without_the_key(server, place):
    with environment(server.environment | {"AWS_SECRET_ACCESS_KEY": "wrong-hunter2secret"}):
        with pytest.raises(UserError, match="access denied") as caught:
            queries.connect(place)
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_view_runs_has_the_options_of_every_run_to_join_with(prefix, db):
    found = db.sql("SELECT run_id, model, seed, source_layer, radius, config->>'target_layer' FROM runs ORDER BY ALL")
    assert found.fetchall() == [("long", "tiny", 0, 8, "10.0", "16"), ("short", "tiny", 0, 8, "10.0", "16")]
    compared = db.sql(queries.EXAMPLES["runs_compared"]).fetchall()
    assert [(row[0], row[1], row[7]) for row in compared] == [
        ("long", "alien", 900),
        ("long", "code", 900),
        ("short", "code", 4),
    ]
    median = np.median([kl_of(n, 4) for n in range(1, 5)])
    assert compared[2][-1] == pytest.approx(median, rel=1e-6)


def test_a_manifest_that_is_no_json_has_no_row_but_its_parts_are_read(tmp_path):
    write_study(tmp_path, "good", num_vectors=2)
    (write_study(tmp_path, "bad", num_vectors=2) / "run.json").write_text("{")
    found = queries.connect(str(tmp_path))
    assert found.sql("SELECT run_id FROM runs").fetchall() == [("good",)]
    assert len(found.sql("SELECT DISTINCT run_id FROM kl").fetchall()) == 2
