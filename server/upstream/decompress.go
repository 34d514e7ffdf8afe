package upstream

import (
	"bufio"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is how far back a compressed stream may refer, in bytes, which is
// what a decoder takes of memory. It is enough for `xz -9` and `zstd -19`.
const maxWindow = 64 << 20

// A decompressor returns the bytes of a compressed stream up to its end. A
// decoder that fails, even by a panic, is malformed data.
type decompressor struct {
	name string
	r    io.Reader
	free func()
}

// Read implements io.Reader.
func (d decompressor) Read(p []byte) (n int, err error) {
	defer func() {
		if v := recover(); v != nil {
			n, err = 0, malformed(d.name, fmt.Errorf("the decoder failed: %v", v))
		}
	}()
	n, err = d.r.Read(p)
	if err != nil && err != io.EOF && !errors.Is(err, ErrMalformed) && !Unreachable(err) {
		err = malformed(d.name, err)
	}
	return n, err
}

// close frees what it holds.
func (d decompressor) close() {
	if d.free != nil {
		d.free()
	}
}

// decoder returns a decompressor of the compression with that name, as narinfos
// have it, of which not more than size bytes are read.
func decoder(compression string, r io.Reader, size int64) (decompressor, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	switch compression {
	case "none":
		return decompressor{name: compression, r: r}, nil
	case "xz":
		return decompressor{name: compression, r: newXZReader(br, size)}, nil
	case "zstd":
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return decompressor{}, malformed(compression, err)
		}
		return decompressor{compression, z, z.Close}, nil
	case "gzip":
		z, err := gzip.NewReader(br)
		if err != nil {
			return decompressor{}, malformed(compression, err)
		}
		return decompressor{name: compression, r: z}, nil
	case "bzip2":
		return decompressor{name: compression, r: bzip2.NewReader(br)}, nil
	case "br":
		return decompressor{name: compression, r: brotli.NewReader(br)}, nil
	}
	return decompressor{}, fmt.Errorf("%w: the compression %.20q is not known here", ErrMalformed, compression)
}

func malformed(compression string, err error) error {
	return fmt.Errorf("%w: decompress %s: %w", ErrMalformed, compression, err)
}
