package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// A Report is what Check found.
type Report struct {
	Accounts int    `json:"accounts"`
	Paths    int    `json:"paths"` // in all views
	Blobs    int    `json:"blobs"`
	Bytes    uint64 `json:"bytes"` // of the blobs, each counted once
	// Problems has one sentence for each fault, at most MaxProblems.
	Problems []string `json:"problems"`
	// More counts the faults beyond those.
	More int `json:"more"`
}

// MaxProblems bounds the list in a Report.
const MaxProblems = 1000

// OK reports whether nothing was wrong.
func (r *Report) OK() bool { return len(r.Problems) == 0 && r.More == 0 }

func (r *Report) problem(format string, args ...any) {
	if len(r.Problems) == MaxProblems {
		r.More++
		return
	}
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// Check compares the index with the blobs; with readData it also reads every
// byte, and compares it with its hash and index. It may run while the store is
// used. Its error says that it could not go on; damage is in the report.
func (s *Store) Check(ctx context.Context, readData bool) (*Report, error) {
	rep := &Report{}
	blobs := make(map[sum]bool)
	signed := 0
	err := s.read(func(tx *bolt.Tx) error {
		err := tx.Bucket(bucketBlobs).ForEach(func(k, _ []byte) error {
			blobs[sum(k)] = true
			return ctx.Err()
		})
		if err != nil {
			return err
		}
		err = tx.Bucket(bucketViews).ForEachBucket(func(k []byte) error {
			rep.Accounts++
			v, err := s.writeView(tx, AccountID(keyID(k)))
			if err != nil {
				return err
			}
			n, err := rep.checkView(ctx, v, blobs)
			signed += n
			if err == nil && readData {
				err = rep.checkClosures(ctx, v)
			}
			return err
		})
		if err != nil {
			return err
		}
		return rep.checkSigned(tx, signed)
	})
	if err != nil {
		return nil, fmt.Errorf("check: %w", err)
	}
	// One blob at a time, each as it is then: nothing is held up.
	for h := range blobs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := s.checkBlob(ctx, h, readData, rep); err != nil {
			rep.problem("blob %s: %v", h, err)
		}
	}
	return rep, nil
}

// checkView checks the records of a view and its indexes against one another.
// It returns how many entries the view has in the index of signed paths.
func (r *Report) checkView(ctx context.Context, v *view, blobs map[sum]bool) (signed int, err error) {
	outputs := 0
	err = v.each(func(p nixproto.StorePath, b []byte) error {
		r.Paths++
		rec, err := decodeRecord(p, b)
		if err != nil {
			r.problem("account %d: %v", v.account, err)
			return ctx.Err()
		}
		h, err := sumOf(rec.NarHash)
		if err != nil || !blobs[h] {
			r.problem("account %d: %s: its content %s is not stored", v.account, p, rec.NarHash)
		}
		for _, ref := range rec.References {
			if !v.has(ref) {
				r.problem("account %d: %s refers to %s, which is not valid", v.account, p, ref)
			}
		}
		for _, out := range rec.outputs {
			outputs++
			if v.derivers().Get(pairKey(out, p.Base())) == nil {
				r.problem("account %d: %s is missing among the derivers of %s", v.account, p, out)
			}
		}
		for _, name := range signers(rec, v.signed.names) {
			signed++
			want := signedKey(name, p.Base(), v.account)
			if k, _ := v.signed.bucket.Cursor().Seek(want); !bytes.Equal(k, want) {
				r.problem("account %d: %s is missing in the index of what %s signed", v.account, p, name)
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return 0, err
	}
	if n := v.derivers().Stats().KeyN; n != outputs {
		r.problem("account %d: %d outputs of derivations, but %d derivers", v.account, outputs, n)
	}
	return signed, nil
}

// checkSigned counts the entries of the index of signed paths, but for those
// that removed accounts left.
func (r *Report) checkSigned(tx *bolt.Tx, want int) error {
	have := 0
	views := tx.Bucket(bucketViews)
	err := tx.Bucket(bucketSigned).ForEach(func(k, _ []byte) error {
		if views.Bucket(k[max(len(k)-8, 0):]) != nil {
			have++
		}
		return nil
	})
	if have != want {
		r.problem("%d signatures by public keys, but %d entries in their index", want, have)
	}
	return err
}

// checkClosures compares the closure hashes that a view keeps with what its
// records say.
func (r *Report) checkClosures(ctx context.Context, v *view) error {
	var all []nixproto.StorePath
	err := v.each(func(p nixproto.StorePath, _ []byte) error {
		all = append(all, p)
		return nil
	})
	if err != nil {
		return err
	}
	sums := make(map[nixproto.StorePath]nixproto.ClosureHash, len(all))
	epoch := v.epoch()
	err = v.closure(ctx, all, func(rec *record) {
		h, err := rec.HashClosure(func(p nixproto.StorePath) (nixproto.ClosureHash, bool) {
			h, ok := sums[p]
			return h, ok
		})
		if err != nil {
			r.problem("account %d: %v", v.account, err)
			return
		}
		sums[rec.Path] = h
		if rec.closure != (sum{}) && rec.epoch == epoch && rec.closure != sum(h) {
			r.problem("account %d: %s: its closure hash is another", v.account, rec.Path)
		}
	})
	if errors.Is(err, ErrNotFound) { // checkView has told
		return nil
	}
	return err
}

// checkBlob checks one blob, unless it was removed meanwhile.
func (s *Store) checkBlob(ctx context.Context, h sum, readData bool, rep *Report) error {
	b, err := s.OpenBlob(ctx, h.hash())
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	rep.Blobs++
	if err != nil {
		return err
	}
	defer b.Close()
	rep.Bytes += uint64(b.Size())
	if !readData {
		return nil
	}
	return b.verify(ctx)
}

// verify reads the blob and compares it with its hash and its index.
func (b *Blob) verify(ctx context.Context) error {
	stored, err := b.readIndex()
	if err != nil {
		return err
	}
	hash := sha256.New()
	x, size, err := nar.ReadIndex(io.TeeReader(&contextReader{ctx, io.NewSectionReader(b, 0, b.Size())}, hash))
	if err != nil {
		return err
	}
	if sum(hash.Sum(nil)) != b.sum || size != b.Size() {
		return fmt.Errorf("%w: its hash is another", ErrDamaged)
	}
	if !slices.Equal(x, stored) {
		return fmt.Errorf("%w: its index is that of another NAR", ErrDamaged)
	}
	return nil
}

// A contextReader fails when its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// Stats are the numbers of `nbd admin status`.
type Stats struct {
	Accounts int
	Paths    int    // in all views
	Blobs    int    // each counted once
	Bytes    uint64 // of the blobs
	Builds   int
}

// Stats counts what is in the store.
func (s *Store) Stats(ctx context.Context) (st Stats, err error) {
	err = s.read(func(tx *bolt.Tx) error {
		st.Builds = tx.Bucket(bucketBuilds).Stats().KeyN
		views := tx.Bucket(bucketViews)
		err := views.ForEachBucket(func(k []byte) error {
			st.Accounts++
			st.Paths += views.Bucket(k).Bucket(viewPaths).Stats().KeyN
			return ctx.Err()
		})
		if err != nil {
			return err
		}
		return tx.Bucket(bucketBlobs).ForEach(func(_, b []byte) error {
			at, err := decodeBlobRecord(b)
			st.Blobs++
			st.Bytes += uint64(at.size)
			return errors.Join(err, ctx.Err())
		})
	})
	return st, err
}
