package store

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// What is stored under a reuse key, for everybody who shares and for single
// accounts. The bytes and logs that it names may be gone: HasBlob, OpenBuildLog.
type Ends struct {
	// Success is the first success; nil if there is none.
	Success *Result
	// Failures are the last permanent failure of each sandbox generation.
	Failures map[string]*Failure
	// Timeouts are the longest runs that passed a limit, of each kind.
	Timeouts map[string]*Timeout
}

// A Result is the first success stored under a reuse key.
type Result struct {
	Build   BuildID   `json:"build"`
	Account AccountID `json:"account"` // that ran it
	Time    time.Time `json:"time"`
	Log     BuildID   `json:"log,omitempty"` // the build that has its log; 0 if none is kept
	// Outputs are the outputs with their content, by name.
	Outputs map[string]ResultOutput `json:"outputs"`
}

// A ResultOutput is an output's path and content.
type ResultOutput struct {
	Path       nixproto.StorePath   `json:"path"`
	NarHash    nixproto.Hash        `json:"narHash"`
	NarSize    uint64               `json:"narSize"` // bytes
	References []nixproto.StorePath `json:"references"`
	CA         string               `json:"ca,omitempty"`
}

// A Failure is a run that failed, and what to answer for it.
type Failure struct {
	Build   BuildID   `json:"build"`
	Account AccountID `json:"account"` // that ran it
	Time    time.Time `json:"time"`
	Log     BuildID   `json:"log"` // the build that has its log
	// Code and Message are the answer; DrvPath is what Message calls the
	// derivation.
	Code    nixproto.BuildStatus `json:"code"`
	Message string               `json:"message"`
	DrvPath nixproto.StorePath   `json:"drvPath"`
	// MemoryMiB is what its guest had; 0 if that is not known.
	MemoryMiB int `json:"memoryMiB,omitempty"`
}

// The kinds of timeouts.
const (
	TimeoutRun    = "time"    // the run took too long
	TimeoutSilent = "silence" // it printed nothing for too long
)

// A Timeout is a run that was ended by a limit of time.
type Timeout struct {
	Failure
	// After is how long it had run, or been silent, when it was ended.
	After time.Duration `json:"after"`
}

// An End is what is stored under a key: how a run ended, as one of Success,
// Failure and Timeout, or how it can be made again, as Recipe.
type End struct {
	Key [32]byte
	// Shared stores it for everybody who shares, Own for one account; 0 for none.
	Shared bool
	Own    AccountID
	// Usable says whose ends may answer others. An earlier end that may not gives
	// way to this one, even where the earlier one would stay; nil for all.
	Usable func(AccountID) bool

	Success *Result
	Failure *Failure
	// Generation is the sandbox generation of a failure.
	Generation string
	Timeout    *Timeout
	Kind       string // of the timeout

	Recipe []byte
}

// usable reports whether an end of an account may answer others.
func (e *End) usable(a AccountID) bool { return e.Usable == nil || e.Usable(a) }

// endsRecord is what the database holds under a key.
type endsRecord struct {
	Result
	Failures map[string]*Failure `json:"failures,omitempty"`
	Timeouts map[string]*Timeout `json:"timeouts,omitempty"`
}

// endsKey is where ends are stored: under the key for everybody who shares,
// under key and account for that account alone.
func endsKey(key [32]byte, own AccountID) []byte {
	if own == 0 {
		return key[:]
	}
	return append(key[:], idKey(uint64(own))...)
}

// getEnds returns what is stored at a key; nothing if there is no record.
func getEnds(tx *bolt.Tx, k []byte) (*endsRecord, error) {
	r := &endsRecord{}
	if _, err := getJSON(tx.Bucket(bucketResults), k, r); err != nil {
		return nil, fmt.Errorf("ends of %x: %w", k, err)
	}
	return r, nil
}

// Ends returns what is stored under a reuse key for everybody who shares or, if
// own is not 0, for that account alone. Nothing stored is an empty Ends.
func (s *Store) Ends(ctx context.Context, key [32]byte, own AccountID) (*Ends, error) {
	var r *endsRecord
	err := s.db.View(func(tx *bolt.Tx) (err error) {
		r, err = getEnds(tx, endsKey(key, own))
		return err
	})
	if err != nil {
		return nil, databaseError(err)
	}
	e := &Ends{Failures: r.Failures, Timeouts: r.Timeouts}
	if r.Outputs != nil {
		e.Success = &r.Result
	}
	return e, nil
}

// putEnd stores an end. A success stays the first one, unless bytes of that are
// gone.
func putEnd(tx *bolt.Tx, e *End) error {
	if e.Recipe != nil {
		b := tx.Bucket(bucketRecipes)
		if b.Get(e.Key[:]) != nil {
			return nil
		}
		return b.Put(e.Key[:], recipeEncoder().EncodeAll(e.Recipe, nil))
	}
	if e.Shared {
		if err := putEndAt(tx, endsKey(e.Key, 0), e); err != nil {
			return err
		}
	}
	if e.Own != 0 {
		return putEndAt(tx, endsKey(e.Key, e.Own), e)
	}
	return nil
}

func putEndAt(tx *bolt.Tx, k []byte, e *End) error {
	r, err := getEnds(tx, k)
	if err != nil {
		return err
	}
	switch {
	case e.Success != nil:
		there, err := contentsThere(tx, r.Outputs)
		if err != nil || there && e.usable(r.Account) {
			return err
		}
		r.Result = *e.Success
	case e.Failure != nil:
		if r.Failures == nil {
			r.Failures = make(map[string]*Failure)
		}
		r.Failures[e.Generation] = e.Failure
	case e.Timeout != nil:
		if old := r.Timeouts[e.Kind]; old != nil && old.After > e.Timeout.After && e.usable(old.Account) {
			return nil
		}
		if r.Timeouts == nil {
			r.Timeouts = make(map[string]*Timeout)
		}
		r.Timeouts[e.Kind] = e.Timeout
	}
	return putJSON(tx.Bucket(bucketResults), k, r)
}

// recipeEncoder and recipeDecoder are for texts of some kilobytes.
var (
	recipeEncoder = sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(err) // the options are wrong
		}
		return e
	})
	recipeDecoder = sync.OnceValue(func() *zstd.Decoder {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(nixproto.MaxMessage*2))
		if err != nil {
			panic(err) // the options are wrong
		}
		return d
	})
)

// WriteRecipe stores how the build with a key can be made again, unless that is
// stored. It is durable a moment later.
func (s *Store) WriteRecipe(ctx context.Context, key [32]byte, recipe []byte) error {
	if _, err := s.builds.add(nil, []End{{Key: key, Recipe: recipe}}); err != nil {
		return err
	}
	s.flushBuildsIn(flushLiveAfter)
	return nil
}

// Recipe returns what WriteRecipe stored, or ErrNotFound.
func (s *Store) Recipe(ctx context.Context, key [32]byte) (recipe []byte, err error) {
	if err := s.flushBuilds(); err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketRecipes).Get(key[:])
		if b == nil {
			return ErrNotFound
		}
		if recipe, err = recipeDecoder().DecodeAll(b, nil); err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("recipe of %x: %w", key, databaseError(err))
	}
	return recipe, nil
}

// contentsThere reports whether the contents of all outputs are stored; false
// if there are no outputs.
func contentsThere(tx *bolt.Tx, outs map[string]ResultOutput) (bool, error) {
	for _, out := range outs {
		h, err := sumOf(out.NarHash)
		if err != nil {
			return false, err
		}
		if tx.Bucket(bucketBlobs).Get(h[:]) == nil {
			return false, nil
		}
	}
	return len(outs) > 0, nil
}

// RevokeEnds forgets everything that is stored under a reuse key, of all
// accounts, and returns how many records that were.
func (s *Store) RevokeEnds(ctx context.Context, key [32]byte) (n int, err error) {
	if err := s.flushBuilds(); err != nil { // an end that is pending must not come after
		return 0, err
	}
	err = s.update(func(tx *bolt.Tx) error {
		n = 0
		c := tx.Bucket(bucketResults).Cursor()
		for k, _ := c.Seek(key[:]); bytes.HasPrefix(k, key[:]); k, _ = c.Seek(key[:]) {
			if err := c.Delete(); err != nil {
				return err
			}
			n++
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("revoke ends of %x: %w", key, err)
	}
	return n, nil
}

// A Hold keeps contents from being removed, whether paths have them or not,
// until Release.
type Hold struct {
	s    *Store
	sums []sum
}

// Hold holds contents, which may not be there. To be sure of some, hold them
// first and ask whether they are stored (HasBlob) then.
func (s *Store) Hold(narHashes ...nixproto.Hash) (*Hold, error) {
	h := &Hold{s: s}
	for _, n := range narHashes {
		x, err := sumOf(n)
		if err != nil {
			h.Release()
			return nil, err
		}
		s.pins.pin(x)
		h.sums = append(h.sums, x)
	}
	return h, nil
}

// Release ends the hold. It is called once; nil holds nothing.
func (h *Hold) Release() {
	if h == nil {
		return
	}
	for _, x := range h.sums {
		h.s.pins.unpin(x)
	}
	h.sums = nil
}
