"""The 88 faults: what each is, and the tests that assert it. `test_cases` holds this table to the tests that exist.

A test is named as pytest names it, from the repository's root, without its parameters. `waits` is for a case of which a
part is not built yet: the first member is how that is seen (`command NAME`, `module NAME` or `key NAME` of a manifest),
the second what has to be written when it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

C, INT, TRAIN, RIG = "tests/catalogue/", "tests/integrity/", "tests/training/", "tests/rig/"
FILES, INDEX, BASE, ADAPTERS = (
    f"{C}test_{name}.py::" for name in ("safetensors_files", "index_and_layout", "base_unmodified", "adapters")
)
WRITING, TRAINING, SERVING = (f"{C}test_{name}.py::" for name in ("writing", "training", "serving"))
BAD, SHELL, HUB, ENGINE = (
    "tests/cli/test_bad_input.py::", "tests/cli/test_commands.py::", "tests/cli/test_hub_commands.py::",
    "tests/serving/test_engine.py::",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One fault of the catalogue."""

    what: str
    tests: tuple[str, ...]
    waits: tuple[str, str] | None = None


def case(what: str, *tests: str, waits: tuple[str, str] | None = None) -> Case:
    return Case(what, tests, waits)


FILE = f"{FILES}test_file"
CASES: dict[int, Case] = {
    1: case("empty file", FILE),
    2: case("file below 8 bytes", FILE),
    3: case("header length 2**63", FILE, f"{FILES}test_nothing_is_allocated_beyond_the_header"),
    4: case("header length 101 MB", FILE, f"{FILES}test_nothing_is_allocated_beyond_the_header"),
    5: case("header longer than the file", FILE),
    6: case("data cut by a byte", FILE, f"{BAD}test_truncated_weights"),
    7: case("trailing bytes", FILE),
    8: case("overlapping tensors", FILE),
    9: case("hole between tensors", FILE),
    10: case("negative or huge dimension", FILE),
    11: case("product of the shape overflows", FILE),
    12: case("no elements, huge other dimensions", FILE),
    13: case("duplicate tensor name", FILE),
    14: case("duplicate metadata key", FILE),
    15: case("header that is no object", FILE),
    16: case("header that is not UTF-8", FILE),
    17: case("unknown type", FILE),
    18: case("a million tensors", f"{FILES}test_a_million_tensors"),
    19: case("control characters in a name", FILE),
    20: case("names equal but for case or Unicode form", FILE),
    21: case("tensor called __metadata__", FILE),
    22: case("something else: web page, LFS pointer", FILE),
    23: case("index leaves the folder", f"{INDEX}test_paths_that_leave_the_folder"),
    24: case("missing shards", f"{INDEX}test_missing_shards", f"{BAD}test_missing_shard"),
    25: case("index names what the shard lacks", f"{INDEX}test_the_index_names_a_tensor_that_its_shard_lacks"),
    26: case("shard holds what the index omits", f"{INDEX}test_a_shard_holds_a_tensor_that_the_index_omits"),
    27: case("one tensor in two shards", f"{INDEX}test_one_tensor_in_two_shards"),
    28: case("index too deep, too large, NaN", f"{INDEX}test_an_index_that_is_no_index"),
    29: case("stale index beside a single file", f"{INDEX}test_a_stale_index_beside_a_single_file"),
    30: case(
        "download not whole (exit 1 where bytes differ from the hub's word, 5 where it cannot be asked)",
        f"{INT}test_snapshots.py::test_a_download_that_is_not_what_the_hub_promised",
        f"{INT}test_snapshots.py::test_a_broken_connection_goes_on_where_it_stopped",
        f"{HUB}test_a_damaged_download_ends_with_1",
    ),
    31: case("loop of symlinks", f"{INDEX}test_a_loop_of_symlinks"),
    32: case("replaced blob", f"{INDEX}test_a_blob_that_was_replaced", f"{HUB}test_a_damaged_download_ends_with_1"),
    33: case(
        "one flipped bit",
        f"{BASE}test_one_flipped_bit",
        f"{BASE}test_the_chunk_of_a_flipped_bit",
        f"{INT}test_manifest.py::test_every_flipped_bit_is_found_and_named",
    ),
    34: case("-0.0 for 0.0", f"{BASE}test_values_that_compare_equal_or_sum_to_the_same"),
    35: case("another NaN", f"{BASE}test_values_that_compare_equal_or_sum_to_the_same"),
    36: case("two tensors swapped", f"{BASE}test_values_that_compare_equal_or_sum_to_the_same"),
    37: case("the same weights, another layout", f"{BASE}test_the_same_weights_in_another_layout"),
    38: case("copy in another type", f"{BASE}test_a_copy_in_another_type"),
    39: case("tied model with and without its head", f"{BASE}test_a_tied_model_with_and_without_its_head"),
    40: case("a frozen weight moves by an ulp", f"{TRAIN}test_fit.py::test_a_weight_changed_by_one_ulp_is_found"),
    41: case(
        "base edited while it is read",
        f"{BASE}test_a_base_that_is_edited_while_it_is_hashed",
        f"{TRAIN}test_fit.py::test_a_base_file_changed_during_the_run_is_found",
    ),
    42: case(
        "base that cannot be written",
        f"{BASE}test_a_base_that_cannot_be_written",
        f"{INT}test_manifest.py::test_a_read_only_model_can_be_hashed_and_is_left_alone",
    ),
    43: case(
        "output is the base, or in it",
        f"{BASE}test_an_output_that_is_the_base_or_in_it",
        f"{BASE}test_an_export_into_a_base_or_its_input",
        f"{BASE}test_a_hard_link_to_the_base",
        f"{BAD}test_output_is_in_or_around_the_base",
        f"{BAD}test_hash_never_writes_into_the_base",
        f"{BASE}test_a_merge_into_a_hard_link_to_a_shard",
    ),
    44: case(
        "only a pickle",
        f"{ADAPTERS}test_only_a_pickle",
        "tests/converters/test_broken_pickle.py::test_a_malicious_pickle_is_refused_and_not_run",
    ),
    45: case("pickle beside safetensors", f"{ADAPTERS}test_a_pickle_beside_safetensors"),
    46: case("weights of the base", f"{ADAPTERS}test_weights_of_the_base"),
    47: case(
        "half a pair, half the layers, unknown layers (exit 4: as bind, convert and gap say it)",
        f"{ADAPTERS}test_half_of_a_pair",
        f"{ADAPTERS}test_half_of_the_layers",
        f"{ADAPTERS}test_an_unknown_layer",
        "tests/converters/test_broken.py::test_broken_inputs_are_refused_whole",
    ),
    48: case(
        "NaN or infinity",
        f"{ADAPTERS}test_values_that_are_not_finite",
        f"{ADAPTERS}test_verify_of_a_sealed_adapter_with_nan",
    ),
    49: case(
        "another base, same shapes",
        f"{ADAPTERS}test_another_base",
        f"{INT}test_wrong_base.py::test_every_other_base_is_refused_and_the_difference_named",
    ),
    50: case("another vocabulary", f"{ADAPTERS}test_another_size"),
    51: case(
        "r and alpha that are none",
        f"{ADAPTERS}test_numbers_that_are_no_rank_and_no_scale",
        f"{ADAPTERS}test_refusals_are_cheap",
    ),
    52: case(
        "patterns that never end",
        f"{ADAPTERS}test_hostile_patterns",
        f"{ADAPTERS}test_a_hostile_target_modules_is_never_run",
        f"{ADAPTERS}test_refusals_are_cheap",
    ),
    53: case(
        "features that are no plain LoRA (auto_mapping is taken and never followed: PEFT writes it for sound ones)",
        f"{ADAPTERS}test_features_that_are_no_plain_lora",
        f"{ADAPTERS}test_a_module_that_the_configuration_names_is_not_imported",
    ),
    54: case("names of adapters", f"{ADAPTERS}test_names", f"{ADAPTERS}test_names_that_are_taken"),
    55: case("configuration that is none", f"{ADAPTERS}test_configurations"),
    56: case(
        "PiSSA, LoRA-GA without their start (3 where served as it is, 2 and 3 where convert asks for it)",
        f"{ADAPTERS}test_initialisations_that_edited_the_base",
        "tests/converters/test_broken.py::test_broken_inputs_are_refused_whole",
    ),
    57: case("archives", f"{ADAPTERS}test_archives"),
    58: case(
        "SIGKILL at every call that writes",
        f"{INT}test_files.py::test_a_kill_at_any_moment_leaves_old_or_new",
        f"{TRAIN}test_resume.py::test_killed_at_a_file_operation",
        f"{RIG}test_crash.py::test_killed",
    ),
    59: case(
        "no space, quota, limit on files",
        f"{WRITING}test_a_disk_that_takes_no_more",
        f"{WRITING}test_a_limit_on_the_size_of_files",
        f"{INT}test_files.py::test_every_failing_call_leaves_old_or_new",
        f"{TRAIN}test_resume.py::test_a_full_disk_keeps_the_run",
        f"{RIG}test_writers.py::test_a_full_disk_at_every_write",
    ),
    60: case(
        "output in a place where it cannot be",
        f"{WRITING}test_places_where_nothing_can_be",
        f"{BAD}test_parent_of_the_output_is_read_only",
        f"{BAD}test_output_is_a_file",
    ),
    61: case(
        "two writers",
        f"{WRITING}test_a_second_writer",
        f"{INT}test_files.py::test_of_two_writers_each_result_is_whole",
        f"{RIG}test_writers.py::test_two_writers",
    ),
    62: case(
        "leftovers of a dead process",
        f"{WRITING}test_what_a_dead_process_left",
        f"{INT}test_files.py::test_a_kill_in_the_body_leaves_the_old_and_the_next_run_sweeps",
    ),
    63: case(
        "fsync fails",
        f"{WRITING}test_a_disk_that_takes_no_more",
        f"{INT}test_files.py::test_every_failing_call_leaves_old_or_new",
    ),
    64: case(
        "merge of a shard larger than memory",
        f"{WRITING}test_a_shard_larger_than_memory",
    ),
    65: case(
        "no space for the second copy of --overwrite",
        f"{RIG}test_writers.py::test_a_small_disk",
        f"{RIG}test_writers.py::test_no_room_is_told_before_work",
        f"{WRITING}test_no_room_for_the_second_copy",
    ),
    66: case("umask", f"{WRITING}test_modes", f"{INT}test_files.py::test_modes_follow_the_umask"),
    67: case("clock, locale, TMPDIR", f"{WRITING}test_odd_surroundings"),
    68: case(
        "no RENAME_EXCHANGE",
        f"{WRITING}test_a_file_system_without_exchange",
        f"{INT}test_files.py::test_a_death_between_the_two_renames_is_undone",
        f"{INT}test_files.py::test_without_renameat2",
    ),
    69: case(
        "signals while it trains",
        f"{BAD}test_signal_during_fit",
        f"{TRAIN}test_resume.py::test_a_signal_during_training",
    ),
    70: case(
        "SIGKILL while a checkpoint is written",
        f"{TRAIN}test_resume.py::test_killed_at_a_file_operation",
        f"{TRAIN}test_resume.py::test_killed_at_twenty_random_moments",
    ),
    71: case("newest checkpoint damaged", f"{TRAIN}test_resume.py::test_a_damaged_newest_checkpoint_is_passed_over"),
    72: case("resume of another run", f"{TRAIN}test_resume.py::test_another_run_is_refused_by_what_differs"),
    73: case(
        "loss that is not finite",
        f"{BAD}test_loss_that_diverges",
        f"{TRAIN}test_resume.py::test_a_loss_of_nan_keeps_and_names_the_last_checkpoint",
    ),
    74: case(
        "bad rows",
        f"{TRAINING}test_a_row_that_is_none",
        f"{BAD}test_row_without_the_needed_fields",
        f"{BAD}test_line_that_is_no_json_object",
        f"{BAD}test_all_prompts_longer_than_the_limit",
    ),
    75: case(
        "worker killed: fit has none; the engine's death is told",
        f"{TRAINING}test_fit_starts_no_process_that_could_be_orphaned",
        f"{ENGINE}test_death_while_serving",
        f"{ENGINE}test_a_killed_parent_leaves_no_orphan",
    ),
    76: case(
        "nobody reads the output",
        f"{TRAINING}test_nobody_reads_the_answer",
        f"{TRAINING}test_a_refusal_that_nobody_reads_keeps_its_status",
        f"{SHELL}test_closed_standard_output_is_no_error",
    ),
    77: case("port taken, bad host", f"{SERVING}test_a_port_that_is_taken", f"{SERVING}test_a_host_that_is_not_here"),
    78: case("open server without a key", f"{SERVING}test_an_open_server_without_a_key"),
    79: case("engine dies at its start", f"{ENGINE}test_early_death_tells_the_reason"),
    80: case(
        "file swapped after it was verified",
        f"{SERVING}test_a_file_that_is_swapped_after_it_was_verified",
        f"{SERVING}test_an_adapter_that_is_swapped_after_it_was_verified",
        f"{SERVING}test_files_that_stand_are_served",
        f"{SERVING}test_weights_that_come_after_the_base_was_verified",
    ),
    81: case(
        "request for a name that is none",
        f"{SERVING}test_no_name_leads_to_a_file",
        "tests/e2e/test_served_parity.py::test_names_that_are_no_model_are_404",
    ),
    82: case(
        "SIGTERM while it serves",
        f"{ENGINE}test_a_signal_stops_the_server",
        f"{ENGINE}test_an_engine_that_ignores_the_request_is_killed",
    ),
    83: case("the key", f"{SERVING}test_the_key_is_nowhere", f"{SHELL}test_serve_never_shows_the_key"),
    84: case(
        "too small for the adapters (exit 2: the option is wrong)",
        f"{SERVING}test_too_small_for_the_adapters",
        f"{SERVING}test_a_rank_that_no_engine_has",
    ),
    85: case(
        "versions with advisories",
        f"{SERVING}test_versions_with_advisories",
        "tests/test_doctor.py::test_a_version_is_held_to_floor_and_advisories",
        "tests/test_doctor.py::test_strict_answers_by_the_exit_status",
    ),
    86: case("base that asks for code", f"{SERVING}test_a_base_that_asks_for_code"),
    87: case("environment that opens the server", f"{SERVING}test_an_environment_that_opens_the_server"),
    88: case("no network", f"{SERVING}test_no_network"),
}
