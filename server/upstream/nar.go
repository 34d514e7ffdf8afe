package upstream

import (
	"context"
	"fmt"
	"io"
	"math"

	"nbd/nixproto"
)

// A NAR is read from a cache by one goroutine. It yields at most as many bytes
// as its narinfo promised; whether they are the right ones is the reader's to
// find out.
type NAR struct {
	file *body
	dec  decompressor
	left uint64
	err  error // sticky
}

// Open opens the NAR that a narinfo of this cache is about. The caller closes
// it. It ends with ctx.
func (k *Cache) Open(ctx context.Context, n *nixproto.NarInfo) (*NAR, error) {
	b, err := k.get.get(ctx, n.URL)
	if err != nil {
		return nil, k.fault(fmt.Errorf("get NAR: %w", err))
	}
	nar, err := newNAR(b, n)
	if err != nil {
		b.Close()
		return nil, k.fault(fmt.Errorf("read NAR: %w", err))
	}
	return nar, nil
}

func newNAR(b *body, n *nixproto.NarInfo) (_ *NAR, err error) {
	file := &bounded{r: b, left: fileLimit(n)}
	inner := decompressor{name: "none", r: file}
	if b.encoding != "" {
		if inner, err = decoder(encodings[b.encoding], file, file.left); err != nil {
			return nil, err
		}
	}
	dec, err := decoder(n.Compression, inner, int64(min(n.NarSize, math.MaxInt64)))
	if err != nil {
		inner.close()
		return nil, err
	}
	free := func() { dec.close(); inner.close() }
	return &NAR{file: b, dec: decompressor{n.Compression, dec, free}, left: n.NarSize}, nil
}

// fileLimit bounds the compressed file: it is not larger than it should be, and
// no compression makes its input much larger.
func fileLimit(n *nixproto.NarInfo) int64 {
	const most = math.MaxInt64 / 2
	limit := min(n.NarSize, most/2)
	limit += limit/8 + 64<<10
	if n.FileSize > 0 {
		limit = min(limit, n.FileSize)
	}
	return int64(limit)
}

// A bounded reader fails where a limit is passed.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		b.left = 0
		return 0, fmt.Errorf("%w: the file is longer than it should be", ErrMalformed)
	}
	return n, err
}

// Read implements io.Reader.
func (n *NAR) Read(p []byte) (int, error) {
	if n.err == nil && n.left == 0 {
		n.err = io.EOF
	}
	if n.err != nil {
		return 0, n.err
	}
	if uint64(len(p)) > n.left {
		p = p[:n.left]
	}
	got, err := n.dec.Read(p)
	n.left -= uint64(got)
	if err == io.EOF && n.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		n.err = fmt.Errorf("read NAR: %w", err)
		err = n.err
	}
	return got, err
}

// Finish says that all bytes were read, and checks that none are left.
func (n *NAR) Finish() error {
	if n.left > 0 {
		return fmt.Errorf("read NAR: %d bytes are left", n.left)
	}
	var p [1]byte
	for {
		got, err := n.dec.Read(p[:])
		switch {
		case got > 0:
			return fmt.Errorf("read NAR: %w: it is longer than it should be", ErrMalformed)
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("read NAR: %w", err)
		}
	}
}

// Close ends the request and frees the decoder.
func (n *NAR) Close() {
	n.dec.close()
	n.file.Close()
}
