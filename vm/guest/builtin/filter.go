package builtin

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// maxFilters is how often an archive may be compressed in itself.
const maxFilters = 8

// maxWindow is how far back a zstd stream may refer, in bytes; libarchive's bound.
const maxWindow = 128 << 20

// A filter is a way to compress.
type filter struct {
	name string
	is   func(head []byte) bool
	open func(io.Reader) (io.Reader, error)
}

// filters are told from one another by how a file begins.
var filters = []filter{
	{"gzip", begins("\x1f\x8b\x08"), func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{"bzip2", begins("BZh"), func(r io.Reader) (io.Reader, error) { return bzip2.NewReader(r), nil }},
	{"xz", begins("\xfd7zXZ\x00"), func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) }},
	{"zstd", isZstd, func(r io.Reader) (io.Reader, error) {
		return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	}},
	{"lzma", isLZMA, func(r io.Reader) (io.Reader, error) { return lzma.NewReader(r) }},
	{"lz4", begins("\x04\x22\x4d\x18"), unknownFilter},
	{"lzip", begins("LZIP"), unknownFilter},
	{"lzop", begins("\x89LZO\x00"), unknownFilter},
	{"compress (.Z)", begins("\x1f\x9d"), unknownFilter},
}

func begins(magic string) func([]byte) bool {
	return func(head []byte) bool { return bytes.HasPrefix(head, []byte(magic)) }
}

// isZstd reports whether head begins a frame of zstd, or one to be skipped.
func isZstd(head []byte) bool {
	return begins("\x28\xb5\x2f\xfd")(head) || len(head) > 4 && head[0]&0xf0 == 0x50 && begins("\x2a\x4d\x18")(head[1:])
}

// isLZMA reports whether head is the header of an .lzma file as they are made:
// the format has no magic number.
func isLZMA(head []byte) bool {
	return len(head) >= lzma.HeaderLen && head[0] == 0x5d && head[1] == 0 && head[2] == 0 && lzma.ValidHeader(head[:lzma.HeaderLen])
}

func unknownFilter(io.Reader) (io.Reader, error) {
	return nil, errors.New("this compression is not known to this server")
}

// A filterError says that a file is not compressed as it should be.
type filterError struct {
	name string
	err  error
}

func (e *filterError) Error() string {
	if errors.Is(e.err, io.ErrUnexpectedEOF) {
		return "truncated " + e.name + " input"
	}
	return e.name + " decompression failed: " + e.err.Error()
}

// A filtered reader marks the errors of a decoder as such. A decoder that panics
// fails.
type filtered struct {
	name string
	r    io.Reader
}

// Read implements io.Reader.
func (f filtered) Read(p []byte) (n int, err error) {
	defer func() {
		if v := recover(); v != nil {
			n, err = 0, &filterError{f.name, fmt.Errorf("%v", v)}
		}
	}()
	n, err = f.r.Read(p)
	var inner *filterError
	if err != nil && err != io.EOF && !errors.As(err, &inner) {
		err = &filterError{f.name, err}
	}
	return n, err
}

// decompress returns what is in r when everything that it was compressed with is
// taken off, which may be nothing.
func decompress(r io.Reader) (*bufio.Reader, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	for range maxFilters {
		head, err := br.Peek(lzma.HeaderLen)
		if err != nil && err != io.EOF {
			return nil, err
		}
		f := filterOf(head)
		if f == nil {
			return br, nil
		}
		inner, err := f.open(br)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, &filterError{f.name, err}
		}
		br = bufio.NewReaderSize(filtered{f.name, inner}, 64<<10)
	}
	return nil, errors.New("it is compressed too many times")
}

func filterOf(head []byte) *filter {
	for i := range filters {
		if filters[i].is(head) {
			return &filters[i]
		}
	}
	return nil
}
