# What ConfigTester sets on every config and reads back.
config_common_kwargs = {
    "architectures": ["ReSTRModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "referred"},
    "label2id": {"referred": "0"},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
