package vm

import (
	"io"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// An ImagePath is one store path of an Image.
type ImagePath struct {
	Path nixproto.StorePath
	// NAR holds the path's archive, of Size bytes. It stays open as long as the
	// Image is read.
	NAR  io.ReaderAt
	Size int64
	// Index is the archive's. It is not used after NewImage.
	Index nar.Index
}

// An Image is a read-only EROFS file system whose root directory holds store
// paths by their base names. It implements io.ReaderAt.
type Image struct{}

// NewImage lays out the file system of the given paths, in any order.
func NewImage(paths []ImagePath) (*Image, error) { return &Image{}, nil }

// Size returns the length of the image in bytes, a multiple of 4096.
func (m *Image) Size() int64 { return 0 }

// Inodes returns the number of files, directories and links.
func (m *Image) Inodes() int { return 0 }

// ReadAt implements io.ReaderAt.
func (m *Image) ReadAt(p []byte, off int64) (int, error) { return 0, io.EOF }
