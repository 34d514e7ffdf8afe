package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// What an account's own runs took, by package name and version, so that the
// next one can be given as much. There is one record for each version; a new run
// of it replaces the record. Each account has a bucket of its own whose sequence
// is the number of records. Both are bounded: what gives way are records that
// were not written for long.
const (
	// maxVersions is of one package on one system.
	maxVersions = 8
	// maxHistory is of one account.
	maxHistory = 20000
	// historySample is how many records are compared to find an old one.
	historySample = 16
)

// A Run is what is known of the last run of one version of a package.
type Run struct {
	System  string `json:"-"` // "x86_64-linux", …
	Package string `json:"-"` // name of the package
	Version string `json:"-"` // "" is one, too

	Build BuildID   `json:"build"`
	Time  time.Time `json:"time"`

	// What the last success had and used; all zero if there was none.
	CPUs       int           `json:"cpus,omitempty"`
	MemoryMiB  int           `json:"memoryMiB,omitempty"`
	DiskMiB    int           `json:"diskMiB,omitempty"`
	PeakMemory int64         `json:"peakMemory,omitempty"` // bytes
	PeakDisk   int64         `json:"peakDisk,omitempty"`   // bytes
	CPUTime    time.Duration `json:"cpuTime,omitempty"`    // of all processors
	Wall       time.Duration `json:"wall,omitempty"`       // of the builder, by the clock

	// ShortMemoryMiB and ShortDiskMiB are the most that was too little since.
	ShortMemoryMiB int `json:"shortMemoryMiB,omitempty"`
	ShortDiskMiB   int `json:"shortDiskMiB,omitempty"`
}

// runPrefix is what the keys of a package's runs begin with: a hash, so that the
// keys of all are spread evenly. A key ends with the version.
func runPrefix(system, pkg string) []byte {
	h := sha256.Sum256([]byte(system + "\x00" + pkg))
	return h[:16]
}

// A runEnd is a run as it is written, for an account.
type runEnd struct {
	account AccountID
	run     Run
}

// NoteRun stores what a run took in place of what is known of that version. It
// is durable with the next EndBuild, or a moment later.
func (s *Store) NoteRun(a AccountID, r Run) {
	s.builds.addRun(runEnd{a, r})
	s.flushBuildsIn(flushBuildsAfter)
}

// addRun makes a run pending.
func (w *buildWrites) addRun(r runEnd) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.runs = append(w.runs, r)
	w.asked++
}

// Runs returns what is known of the versions of a package that the account
// itself has run.
func (s *Store) Runs(ctx context.Context, a AccountID, system, pkg string) (list []Run, err error) {
	prefix := runPrefix(system, pkg)
	err = s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketHistory).Bucket(idKey(uint64(a)))
		if b == nil {
			return nil
		}
		c := b.Cursor()
		for k, v := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, v = c.Next() {
			r := Run{System: system, Package: pkg, Version: string(k[len(prefix):])}
			if err := decodeJSON(v, &r); err != nil {
				return err
			}
			list = append(list, r)
		}
		return ctx.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("history of %s: %w", pkg, databaseError(err))
	}
	return list, nil
}

// putRun writes a run. Nothing is kept of accounts that were removed.
func putRun(tx *bolt.Tx, e *runEnd) error {
	if _, err := getAccount(tx, e.account); errors.Is(err, ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	b, err := tx.Bucket(bucketHistory).CreateBucketIfNotExists(idKey(uint64(e.account)))
	if err != nil {
		return err
	}
	prefix := runPrefix(e.run.System, e.run.Package)
	k := append(slices.Clone(prefix), e.run.Version...)
	if b.Get(k) == nil {
		if err := makeRoom(b, prefix); err != nil {
			return err
		}
		if err := b.SetSequence(b.Sequence() + 1); err != nil {
			return err
		}
	}
	return putJSON(b, k, &e.run)
}

// makeRoom removes records until there is room for one more with that prefix.
func makeRoom(b *bolt.Bucket, prefix []byte) error {
	var oldest []byte
	var when time.Time
	consider := func(k, v []byte) {
		var r Run
		_ = decodeJSON(v, &r) // one that is damaged has no time, and goes first
		if oldest == nil || r.Time.Before(when) {
			oldest, when = slices.Clone(k), r.Time
		}
	}
	n, c := 0, b.Cursor()
	for k, v := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, v = c.Next() {
		consider(k, v)
		n++
	}
	if n < maxVersions {
		if b.Sequence() < maxHistory {
			return nil
		}
		oldest = nil
		sampleRuns(b, consider)
	}
	if oldest == nil {
		return nil
	}
	if err := b.Delete(oldest); err != nil {
		return err
	}
	return b.SetSequence(b.Sequence() - 1)
}

// sampleRuns calls f with records that follow some place in the bucket, which is
// not empty.
func sampleRuns(b *bolt.Bucket, f func(k, v []byte)) {
	c := b.Cursor()
	k, v := c.Seek(binary.BigEndian.AppendUint64(nil, rand.Uint64()))
	for range historySample {
		if k == nil {
			k, v = c.First()
		}
		f(k, v)
		k, v = c.Next()
	}
}

// removeRuns forgets all runs of an account.
func removeRuns(tx *bolt.Tx, a AccountID) error {
	err := tx.Bucket(bucketHistory).DeleteBucket(idKey(uint64(a)))
	if errors.Is(err, berrors.ErrBucketNotFound) {
		return nil
	}
	return err
}
