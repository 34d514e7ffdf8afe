package nar

import (
	"errors"
	"fmt"
	"io"
)

// ReadIndex reads one archive from r, in large pieces, and returns its index
// and size. r has to end with the archive: it is for files and tests; on a
// stream that goes on, feed a Parser.
func ReadIndex(r io.Reader) (Index, int64, error) {
	var p Parser
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Read(buf)
		used, perr := p.Feed(buf[:n])
		switch {
		case perr != nil:
			return nil, 0, perr
		case used < n:
			return nil, 0, malformed("%d bytes and more after the end", n-used)
		case errors.Is(err, io.EOF):
			if err := p.Close(); err != nil {
				return nil, 0, err
			}
			return p.Index(), p.Size(), nil
		case err != nil:
			return nil, 0, fmt.Errorf("read archive: %w", err)
		}
	}
}

// Contents returns the contents of regular file e, read from the archive r
// when they are asked for.
func Contents(r io.ReaderAt, e Entry) *io.SectionReader {
	return io.NewSectionReader(r, e.Offset, e.Size)
}
