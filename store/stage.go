package store

import (
	"context"
	"errors"
	"fmt"
	"io"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// A Staged is a NAR that is stored but in no view yet. It is written by one
// goroutine: Write until Finish, then it can be read by several until Register
// or Discard. To register other bytes instead, such as a copy with another
// path in it, stage them too.
type Staged struct {
	s    *Store
	in   *ingest
	mem  []byte    // a small NAR
	file *blobFile // else
	err  error     // the first one of Write or Finish
	done bool      // Finish was called
	used bool      // by Register or Discard
	sum  sum
	size int64
}

// Stage begins to take one NAR whose path, hash and size are not known yet, for
// an account.
func (s *Store) Stage(ctx context.Context, a AccountID) (*Staged, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.room(0); err != nil {
		return nil, err
	}
	st := &Staged{s: s}
	st.in = newIngest(s.NewCharge(a), (*stagedWriter)(st))
	return st, nil
}

// Write takes bytes of the NAR. Malformed bytes, and any after the NAR's end,
// are ErrInvalid; a full disk is ErrNoSpace; more files than there is memory for
// are ErrBusy.
func (st *Staged) Write(p []byte) (int, error) {
	if st.err == nil && st.done {
		st.err = errStagedDone
	}
	if st.err != nil {
		return 0, st.err
	}
	n, err := st.in.Write(p)
	st.err = err
	return n, err
}

var errStagedDone = errors.New("staged NAR is finished")

// ReadNAR takes the whole NAR from src, whose end only its own structure tells,
// and no byte more. Errors are those of Write and of src; an early end is
// io.ErrUnexpectedEOF.
func (st *Staged) ReadNAR(src narSource) error {
	for st.err == nil && !st.in.parser.Done() {
		b, err := src.Peek()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("read NAR: %w", err)
		}
		n, err := st.in.readSome(b)
		if err == nil {
			_, err = st.in.to.Write(b[:n])
		}
		st.err = err
		src.Discard(n)
	}
	return st.err
}

// A stagedWriter takes the bytes that were parsed and hashed.
type stagedWriter Staged

func (w *stagedWriter) Write(p []byte) (int, error) {
	w.size += int64(len(p))
	if w.file == nil && w.size > smallNAR {
		f, err := w.s.newBlobFile()
		if err != nil {
			return 0, err
		}
		w.file = f
		if _, err := f.Write(w.mem); err != nil {
			return 0, err
		}
		w.mem = nil
	}
	if w.file != nil {
		return w.file.Write(p)
	}
	w.mem = append(w.mem, p...)
	return len(p), nil
}

// Finish says that the NAR is complete; one that ends early is ErrInvalid.
func (st *Staged) Finish() error {
	if st.done || st.err != nil {
		return st.err
	}
	st.done = true
	st.sum, st.err = st.in.finish()
	return st.err
}

// NarHash returns the SHA-256 of the NAR; after Finish.
func (st *Staged) NarHash() nixproto.Hash { return st.sum.hash() }

// NarSize returns the length of the NAR in bytes; after Finish.
func (st *Staged) NarSize() uint64 { return uint64(st.size) }

// Index returns what is in the NAR; after Finish. The caller does not change it.
func (st *Staged) Index() nar.Index { return st.in.parser.Index() }

// ReadAt reads bytes of the NAR; after Finish and before Discard or Register.
func (st *Staged) ReadAt(p []byte, off int64) (int, error) {
	if !st.done || st.used {
		return 0, errors.New("read staged NAR: it is not there")
	}
	if off < 0 || off >= st.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > st.size-off
	if short {
		p = p[:st.size-off]
	}
	n := len(p)
	var err error
	if st.file != nil {
		n, err = st.file.f.ReadAt(p, off)
	} else {
		copy(p, st.mem[off:])
	}
	if err != nil {
		return n, fmt.Errorf("read staged NAR: %w", err)
	}
	if short {
		err = io.EOF
	}
	return n, err
}

// Discard drops the NAR; nothing happens if it was registered.
func (st *Staged) Discard() {
	st.in.charge.Release()
	if st.used {
		return
	}
	st.used = true
	st.mem = nil
	if st.file != nil {
		st.file.drop()
	}
}
