package store

import (
	"context"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// A reader looks into several views while the database goes on changing. What
// was committed before a look is found by it. It holds a transaction, so that
// its owner neither waits for others nor opens another one until close.
type reader struct {
	s       *Store
	tx      *bolt.Tx
	flushes uint64 // those that tx is known to have seen
	views   map[AccountID]*view
}

// newReader returns a reader; the caller closes it.
func (s *Store) newReader() (*reader, error) {
	r := &reader{s: s}
	return r, r.renew()
}

// renew begins another transaction.
func (r *reader) renew() error {
	r.close()
	r.flushes = r.s.flushes.Load()
	tx, err := r.s.db.Begin(false)
	if err != nil {
		return databaseError(err)
	}
	r.tx, r.views = tx, make(map[AccountID]*view)
	return nil
}

// close ends the transaction.
func (r *reader) close() {
	if r.tx != nil {
		_ = r.tx.Rollback() // of a read transaction: it has nothing to fail with
		r.tx = nil
	}
}

// view returns the view of an account; nil if there is no such account.
func (r *reader) view(a AccountID) *view {
	v, ok := r.views[a]
	if !ok {
		v, _ = openView(r.tx, a) // not there and not yours are one answer
		r.views[a] = v
	}
	return v
}

// find returns the record of a path: rec if it is pending, else its encoding
// as the database has it, until the next call of a method; neither if there is
// none.
func (r *reader) find(a AccountID, p nixproto.StorePath) (rec *record, encoded []byte, err error) {
	for {
		if rec := r.s.pendingRecord(a, p); rec != nil {
			return rec, nil, nil
		}
		if v := r.view(a); v != nil {
			if encoded = v.paths.Get([]byte(p.Base())); encoded != nil {
				return nil, encoded, nil
			}
		}
		// What was pending when the transaction began may have gone into the
		// database since.
		if r.s.flushes.Load() == r.flushes {
			return nil, nil, nil
		}
		if err := r.renew(); err != nil {
			return nil, nil, err
		}
	}
}

// get returns the record of a path; nil if it is not in the view.
func (r *reader) get(a AccountID, p nixproto.StorePath) (*record, error) {
	rec, encoded, err := r.find(a, p)
	if rec != nil || encoded == nil || err != nil {
		return rec, err
	}
	return decodeRecord(p, encoded)
}

// has reports whether a path is in the view.
func (r *reader) has(a AccountID, p nixproto.StorePath) (bool, error) {
	rec, encoded, err := r.find(a, p)
	return rec != nil || encoded != nil, err
}

// walk calls f with the records of the closure of roots, each after those of
// the paths it refers to. It gets them from want, whose errors end it.
func walk(ctx context.Context, roots []nixproto.StorePath, want func(nixproto.StorePath) (*record, error), f func(*record)) error {
	// A step is a path whose references are being visited, from next on.
	type step struct {
		rec  *record
		next int
	}
	seen := make(map[nixproto.StorePath]bool)
	var stack []step
	enter := func(p nixproto.StorePath) error {
		if seen[p] {
			return nil
		}
		seen[p] = true
		r, err := want(p)
		if err != nil {
			return err
		}
		stack = append(stack, step{rec: r})
		return ctx.Err()
	}
	for _, p := range roots {
		if err := enter(p); err != nil {
			return err
		}
		for len(stack) > 0 {
			top := &stack[len(stack)-1]
			if top.next == len(top.rec.References) {
				f(top.rec)
				stack = stack[:len(stack)-1]
				continue
			}
			top.next++
			if err := enter(top.rec.References[top.next-1]); err != nil {
				return err
			}
		}
	}
	return nil
}
