package store

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"nbd/nixproto/nar"
)

// smallNAR is the size up to which NARs lie in segments.
const smallNAR = 64 << 10

// writeback is after how many bytes of a file the kernel is told to begin
// writing, so that the sync at the end finds little to do and dirty pages do
// not pile up.
const writeback = 8 << 20

// An ingest takes one NAR in pieces: it parses it strictly, hashes it and hands
// it on, in one pass. It is used by one goroutine, which releases charge when the
// index is not needed any more.
type ingest struct {
	parser *nar.Parser
	charge *Charge // of the index
	hash   hash.Hash
	check  *contentCheck // nil if nothing is known of the content
	to     io.Writer
}

func newIngest(charge *Charge, to io.Writer) *ingest {
	return &ingest{parser: &nar.Parser{}, charge: charge, hash: sha256.New(), to: to}
}

// reset makes in ready for another NAR.
func (in *ingest) reset(to io.Writer) {
	*in.parser = nar.Parser{}
	in.charge.Release()
	in.hash.Reset()
	in.check, in.to = nil, to
}

// Write takes bytes of the NAR. It refuses malformed ones, and any after the
// end, with ErrInvalid.
func (in *ingest) Write(p []byte) (int, error) {
	if err := in.read(p); err != nil {
		return 0, err
	}
	return in.to.Write(p)
}

// read does what Write does, but for handing on.
func (in *ingest) read(p []byte) error {
	n, err := in.readSome(p)
	if err == nil && n < len(p) {
		err = fmt.Errorf("%w NAR: bytes after its end", ErrInvalid)
	}
	return err
}

// readSome reads all of p, or up to the NAR's last byte.
func (in *ingest) readSome(p []byte) (n int, err error) {
	if n, err = in.parser.Feed(p); err != nil {
		return n, fmt.Errorf("%w NAR: %w", ErrInvalid, err)
	}
	if err := in.charge.Set(in.parser.Memory()); err != nil {
		return n, err
	}
	in.hash.Write(p[:n])
	if in.check != nil {
		_, err = in.check.Write(p[:n])
	}
	return n, err
}

// handOn hands on what was read, at once if possible.
func (in *ingest) handOn(pieces [][]byte) error {
	if to, ok := in.to.(*blobFile); ok {
		return to.writeAll(pieces)
	}
	for _, p := range pieces {
		if _, err := in.to.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// finish says that no more comes, and returns the NAR's hash.
func (in *ingest) finish() (h sum, err error) {
	if err := in.parser.Close(); err != nil {
		return h, fmt.Errorf("%w NAR: %w", ErrInvalid, err)
	}
	in.hash.Sum(h[:0])
	return h, nil
}

// A narSource is a stream that hands out what it holds without copying.
// nixproto.Source says more of its methods.
type narSource interface {
	// Peek waits for bytes and returns those that are there, one at least.
	// They stay until it is called while Ready is false.
	Peek() ([]byte, error)
	// Discard takes n bytes of those that Peek returned.
	Discard(n int)
	Ready() bool
}

// maxPieces is how many pieces of a NAR are written at once. Clients send it in
// frames of 32 KiB.
const maxPieces = 32

// copyNAR hands exactly n bytes from r to in, and takes no more than that from
// r.
func copyNAR(in *ingest, r io.Reader, n uint64) error {
	src, ok := r.(narSource)
	if !ok {
		src = &peeker{r: r, left: n}
	}
	var pieces [][]byte // read, and not handed on yet
	for n > 0 {
		b, err := src.Peek()
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read NAR: %w", err)
		}
		b = b[:min(uint64(len(b)), n)]
		if err := in.read(b); err != nil {
			return err
		}
		pieces = append(pieces, b)
		src.Discard(len(b))
		n -= uint64(len(b))
		if n > 0 && len(pieces) < maxPieces && src.Ready() {
			continue
		}
		if err := in.handOn(pieces); err != nil {
			return err
		}
		pieces = pieces[:0]
	}
	return nil
}

// A peeker makes a narSource of a Reader; it reads at most left bytes from it.
type peeker struct {
	r    io.Reader
	left uint64
	buf  []byte
	have []byte
}

func (p *peeker) Peek() ([]byte, error) {
	if len(p.have) > 0 {
		return p.have, nil
	}
	if p.buf == nil {
		p.buf = make([]byte, min(p.left, 512<<10))
	}
	for range 100 { // as many empty reads as bufio allows
		n, err := p.r.Read(p.buf[:min(uint64(len(p.buf)), p.left)])
		p.left -= uint64(n)
		if p.have = p.buf[:n]; n > 0 {
			return p.have, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, io.ErrNoProgress
}

func (p *peeker) Discard(n int) { p.have = p.have[n:] }
func (p *peeker) Ready() bool   { return len(p.have) > 0 }

// A blobFile is a NAR on its way into a file of its own.
type blobFile struct {
	store   *Store
	f       *os.File
	path    string
	size    int64 // bytes of the NAR written
	sums    summer
	started int64 // up to where the kernel was told to write
	err     error // of a write; the file is of no use then
}

// newBlobFile creates a file in tmp.
func (s *Store) newBlobFile() (*blobFile, error) {
	path := filepath.Join(s.dir, "tmp", strconv.FormatUint(s.tmpNames.Add(1), 10))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create blob: %w", diskError(err))
	}
	return &blobFile{store: s, f: f, path: path}, nil
}

// Write implements io.Writer.
func (b *blobFile) Write(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	b.sums.add(p)
	n, err := b.f.Write(p)
	return n, b.wrote(n, err)
}

// writeAll writes pieces, with one system call as a rule. It changes the list.
func (b *blobFile) writeAll(pieces [][]byte) error {
	for _, p := range pieces {
		b.sums.add(p)
	}
	for len(pieces) > 0 && b.err == nil {
		n, err := unix.Writev(int(b.f.Fd()), pieces)
		if err == unix.EINTR {
			continue
		}
		if err := b.wrote(n, err); err != nil {
			return err
		}
		for ; len(pieces) > 0 && n >= len(pieces[0]); pieces = pieces[1:] {
			n -= len(pieces[0])
		}
		if n > 0 {
			pieces[0] = pieces[0][n:]
		}
	}
	return b.err
}

// wrote takes the outcome of a write.
func (b *blobFile) wrote(n int, err error) error {
	b.size += int64(max(n, 0))
	switch {
	case err != nil:
		b.err = fmt.Errorf("write blob: %w", diskError(err))
	case b.size-b.started >= writeback:
		if b.err = b.store.room(0); b.err == nil {
			b.startWriteback()
		}
	}
	return b.err
}

// startWriteback tells the kernel to begin writing. That it does not matters
// to nobody but the sync.
func (b *blobFile) startWriteback() {
	_ = unix.SyncFileRange(int(b.f.Fd()), b.started, b.size-b.started, unix.SYNC_FILE_RANGE_WRITE)
	b.started = b.size
}

// finish writes index and checksums behind the NAR and returns the blob's record.
func (b *blobFile) finish(x nar.Index) (blobRecord, error) {
	at := blobRecord{size: b.size}
	if b.err != nil {
		return at, b.err
	}
	index, err := encodeIndex(x)
	if err != nil {
		return at, err
	}
	at.setTail(index, b.sums.finish())
	if _, err := b.f.Write(append(index, b.sums.done...)); err != nil {
		b.err = fmt.Errorf("write index: %w", diskError(err))
		return at, b.err
	}
	if err := b.f.Chmod(0o400); err != nil {
		return at, fmt.Errorf("write blob: %w", err)
	}
	return at, nil
}

// encodeIndex returns the encoding of x.
func encodeIndex(x nar.Index) ([]byte, error) {
	b, err := x.AppendBinary(nil)
	if err != nil {
		return nil, fmt.Errorf("encode index: %w", err)
	}
	return b, nil
}

// drop removes the file, unless it was placed.
func (b *blobFile) drop() {
	if b.path == "" {
		return
	}
	_ = b.f.Close() // it may be closed already
	if err := os.Remove(b.path); err != nil {
		b.store.log.Warn("remove temporary file", "error", err)
	}
	b.path = ""
}

// place moves the synced file to the name of its content. The directory is yet
// to be synced.
func (b *blobFile) place(h sum) error {
	if err := os.Rename(b.path, b.store.blobPath(h)); err != nil {
		return fmt.Errorf("place blob: %w", diskError(err))
	}
	b.path = ""
	return nil
}
