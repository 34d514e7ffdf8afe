package store

import (
	"fmt"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// A view is the bucket of an account's view in one transaction.
type view struct {
	account AccountID
	bucket  *bolt.Bucket
	paths   *bolt.Bucket
	signed  *signedIndex // nil in a view that is only read
}

// openView returns the view of an account, or ErrNotFound.
func openView(tx *bolt.Tx, a AccountID) (*view, error) {
	b := tx.Bucket(bucketViews).Bucket(idKey(uint64(a)))
	if b == nil {
		return nil, fmt.Errorf("account %d: %w", a, ErrNotFound)
	}
	return &view{account: a, bucket: b, paths: b.Bucket(viewPaths)}, nil
}

func (v *view) derivers() *bolt.Bucket     { return v.bucket.Bucket(viewDerivers) }
func (v *view) realisations() *bolt.Bucket { return v.bucket.Bucket(viewRealisations) }

// createView makes the buckets of a new account's view.
func createView(tx *bolt.Tx, a AccountID) error {
	b, err := tx.Bucket(bucketViews).CreateBucket(idKey(uint64(a)))
	if err != nil {
		return err
	}
	for _, name := range [][]byte{viewPaths, viewDerivers, viewRealisations} {
		if _, err := b.CreateBucket(name); err != nil {
			return err
		}
	}
	return nil
}

// get returns the record of a path; nil if it is not in the view.
func (v *view) get(p nixproto.StorePath) (*record, error) {
	b := v.paths.Get([]byte(p.Base()))
	if b == nil {
		return nil, nil
	}
	return decodeRecord(p, b)
}

// want returns the record of a path, or ErrNotFound.
func (v *view) want(p nixproto.StorePath) (*record, error) {
	r, err := v.get(p)
	if err == nil && r == nil {
		err = fmt.Errorf("path %s: %w", p, ErrNotFound)
	}
	return r, err
}

// has reports whether a path is in the view.
func (v *view) has(p nixproto.StorePath) bool { return v.paths.Get([]byte(p.Base())) != nil }

// put writes the record of a path over the one that is there, if any, and
// keeps the indexes and the epoch in step.
func (v *view) put(r *record) error {
	old, err := v.get(r.Path)
	if err == nil && old != nil {
		err = v.removeRecord(old)
		if err == nil && !old.sameContent(r) {
			err = v.nextEpoch()
		}
	}
	if err != nil {
		return err
	}
	rec, err := appendRecord(nil, r)
	if err != nil {
		return err
	}
	base := r.Path.Base()
	if err := v.paths.Put([]byte(base), rec); err != nil {
		return err
	}
	for _, out := range r.outputs {
		if err := v.derivers().Put(pairKey(out, base), nil); err != nil {
			return err
		}
	}
	return v.signed.put(r)
}

// removeRecord takes the path of r, which is its record, out of the view.
func (v *view) removeRecord(r *record) error {
	base := r.Path.Base()
	for _, out := range r.outputs {
		if err := v.derivers().Delete(pairKey(out, base)); err != nil {
			return err
		}
	}
	if err := v.signed.remove(r); err != nil {
		return err
	}
	return v.paths.Delete([]byte(base))
}

// epoch returns the view's epoch; see closurehash.go.
func (v *view) epoch() uint64 {
	return keyID(v.bucket.Get(viewEpoch))
}

// nextEpoch makes all closure hashes of the view void.
func (v *view) nextEpoch() error {
	return v.bucket.Put(viewEpoch, idKey(v.epoch()+1))
}

// each calls f with every path of the view, sorted, and its encoded record,
// which is valid within the transaction.
func (v *view) each(f func(p nixproto.StorePath, rec []byte) error) error {
	return v.paths.ForEach(func(k, rec []byte) error {
		return f(nixproto.StorePath(storePrefix+string(k)), rec)
	})
}

// referrers calls f with each path that refers to one of targets, and that
// one. It reads all records of the view: some 100 ms for 100,000 paths.
func (v *view) referrers(targets map[string]bool, f func(p, target nixproto.StorePath) error) error {
	return v.each(func(p nixproto.StorePath, rec []byte) error {
		return eachReference(rec, func(base []byte) error {
			if !targets[string(base)] {
				return nil
			}
			return f(p, nixproto.StorePath(storePrefix+string(base)))
		})
	})
}
