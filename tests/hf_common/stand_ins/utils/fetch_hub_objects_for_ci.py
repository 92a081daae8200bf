def url_to_local_path(url, return_url_if_not_found=True):
    """Nothing is fetched ahead of the run: a URL stays what it is."""
    return url
