package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// A BuildID names a build record. Ids grow with time and begin at 1.
type BuildID uint64

// The states of a build: pending and running, and how it ended.
const (
	StatusPending           = "pending"
	StatusRunning           = "running"
	StatusBuilt             = "built"
	StatusBuildFailed       = "build_failed"
	StatusTimeout           = "timeout"
	StatusInternalError     = "internal_error"
	StatusLogLimit          = "log_limit"
	StatusOutOfMemory       = "out_of_memory"
	StatusMaxMemoryExceeded = "max_memory_exceeded"
	StatusClientDisconnect  = "client_disconnect"
	StatusCancelled         = "cancelled"
	StatusClientError       = "client_error"
)

// A Build is the record of one request for a build: of a run, or of a request
// that was answered or refused without one (Reused).
type Build struct {
	ID      BuildID            `json:"id"`
	Account AccountID          `json:"account"`
	DrvPath nixproto.StorePath `json:"drvPath"`
	Name    string             `json:"name"`
	System  string             `json:"system"`
	Status  string             `json:"status"` // one of the Status constants
	// Error is one line for a person; empty on success.
	Error string `json:"error,omitempty"`

	Created time.Time `json:"created"`
	Started time.Time `json:"started,omitzero"`
	Stopped time.Time `json:"stopped,omitzero"`

	CPUUser     time.Duration `json:"cpuUser,omitempty"`
	CPUSystem   time.Duration `json:"cpuSystem,omitempty"`
	CPUs        int           `json:"cpus,omitempty"`
	MemoryMiB   int           `json:"memoryMiB,omitempty"`
	DiskMiB     int           `json:"diskMiB,omitempty"`
	PeakMemory  int64         `json:"peakMemory,omitempty"`  // bytes
	PeakStorage int64         `json:"peakStorage,omitempty"` // bytes
	LogSize     int64         `json:"logSize,omitempty"`     // bytes, uncompressed

	Outputs []BuildOutput     `json:"outputs,omitempty"`
	Tags    map[string]string `json:"tags,omitempty"`
	// Key is the reuse key in hex; empty if the build has none.
	Key string `json:"key,omitempty"`
	// Generation is the sandbox generation that it ran in.
	Generation string `json:"generation,omitempty"`

	RestartOf   BuildID `json:"restartOf,omitempty"`
	RestartedAs BuildID `json:"restartedAs,omitempty"`

	// Reused says that no run was made for this request: its outputs were valid
	// already, a stored end answered it, it joined the run of another request, or
	// it was refused, which Status tells (StatusClientError). ReusedFrom is the run that it was answered from, if that is the
	// account's own and known.
	Reused     bool    `json:"reused,omitempty"`
	ReusedFrom BuildID `json:"reusedFrom,omitempty"`
	// LogOf is the build whose log is that of this one, of whatever account; 0
	// if it is its own.
	LogOf BuildID `json:"logOf,omitempty"`

	// Network is what a build with a network did with it; nil for one without.
	Network *BuildNetwork `json:"network,omitempty"`

	// CPUSeconds is the CPU time that the account pays for, LimitSeconds what
	// counts against a monthly limit: that and what it caused to be thrown away.
	CPUSeconds   int64 `json:"cpuSeconds,omitempty"`
	LimitSeconds int64 `json:"limitSeconds,omitempty"`

	// Decisions say how the request was answered and why, in the order in which
	// they were made.
	Decisions []Decision `json:"decisions,omitempty"`

	// Extra is what the server keeps with the build besides; the store does
	// not look into it.
	Extra json.RawMessage `json:"extra,omitempty"`
}

// A Decision is one check on the way to an answer.
type Decision struct {
	Check  string `json:"check"`           // one word: "outputs", "success", "run", …
	Taken  bool   `json:"taken,omitempty"` // it decided
	Reason string `json:"reason"`          // one line for a person
}

// A BuildOutput is one output of a build that succeeded.
type BuildOutput struct {
	Name    string             `json:"name"`
	Path    nixproto.StorePath `json:"path"`
	NarHash nixproto.Hash      `json:"narHash"`
	NarSize uint64             `json:"narSize"` // bytes
}

// ended reports whether the build's status is a final one.
func (b *Build) ended() bool { return b.Status != StatusPending && b.Status != StatusRunning }

// refused reports whether the request was refused without a run.
func (b *Build) refused() bool { return b.Reused && b.Status == StatusClientError }

// What the index of builds has with a record: nothing for a run.
const (
	indexedReused  = 1
	indexedRefused = 2
)

// indexed is what the index has with b.
func (b *Build) indexed() []byte {
	switch {
	case b.refused():
		return []byte{indexedRefused}
	case b.Reused:
		return []byte{indexedReused}
	}
	return nil
}

// BuildFilter selects builds. Zero fields select all.
type BuildFilter struct {
	From, To time.Time // Created within [From, To)
	Status   []string
	Before   BuildID // only ids below, for paging
	// Reused selects requests that were answered or refused without a run, too,
	// Refused only those of them that were refused.
	Reused, Refused bool
	Limit           int
	// Match, if not nil, has the last word.
	Match func(*Build) bool
}

// getBuild returns the build at a key, or ErrNotFound.
func getBuild(tx *bolt.Tx, k []byte) (*Build, error) {
	b := &Build{}
	ok, err := getJSON(tx.Bucket(bucketBuilds), k, b)
	if err == nil && !ok {
		err = ErrNotFound
	}
	return b, err
}

// Build returns the record of a build, or ErrNotFound.
func (s *Store) Build(ctx context.Context, id BuildID) (b *Build, err error) {
	if rec := s.builds.waiting(id); rec != nil {
		b = &Build{}
		return b, decodeJSON(rec, b)
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		b, err = getBuild(tx, idKey(uint64(id)))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("build %d: %w", id, databaseError(err))
	}
	return b, nil
}

// clockSlack is how much later than its successors a build may say that it was
// created.
const clockSlack = time.Hour

// Builds returns the builds of an account that f selects, newest first.
func (s *Store) Builds(ctx context.Context, a AccountID, f BuildFilter) (list []Build, err error) {
	if err := s.flushBuilds(); err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		prefix := idKey(uint64(a))
		before := f.Before
		if before == 0 {
			before = ^BuildID(0)
		}
		c := tx.Bucket(bucketBuildIndex).Cursor()
		k, v := c.Seek(append(slices.Clone(prefix), idKey(uint64(before))...))
		if k == nil {
			k, v = c.Last()
		} else {
			k, v = c.Prev()
		}
		for ; len(k) == 16 && slices.Equal(k[:8], prefix); k, v = c.Prev() {
			if err := ctx.Err(); err != nil {
				return err
			}
			if !f.indexed(v) {
				continue
			}
			b, err := getBuild(tx, k[8:])
			if err != nil {
				return fmt.Errorf("build %d: %w", keyID(k[8:]), err)
			}
			if b.Created.Before(f.From.Add(-clockSlack)) {
				return nil
			}
			if f.selects(b) {
				list = append(list, *b)
			}
			if f.Limit > 0 && len(list) == f.Limit {
				return nil
			}
		}
		return nil
	})
	return list, databaseError(err)
}

// indexed reports whether f may select a record with which the index has v.
func (f *BuildFilter) indexed(v []byte) bool {
	return len(v) == 0 || f.Reused || f.Refused && v[0] == indexedRefused
}

// BuildAccounts returns the accounts that have records of builds, those that
// were removed among them.
func (s *Store) BuildAccounts(ctx context.Context) (list []AccountID, err error) {
	if err := s.flushBuilds(); err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketBuildIndex).Cursor()
		for k, _ := c.First(); len(k) == 16; {
			a := keyID(k[:8])
			list = append(list, AccountID(a))
			k, _ = c.Seek(idKey(a + 1))
		}
		return ctx.Err()
	})
	return list, databaseError(err)
}

// selects reports whether f selects b.
func (f *BuildFilter) selects(b *Build) bool {
	switch {
	case !f.From.IsZero() && b.Created.Before(f.From):
	case !f.To.IsZero() && !b.Created.Before(f.To):
	case len(f.Status) > 0 && !slices.Contains(f.Status, b.Status):
	case f.Match != nil && !f.Match(b):
	default:
		return true
	}
	return false
}

// endBuilds gives the builds that had not ended when the store was last open
// the status of builds whose server ended.
func endBuilds(tx *bolt.Tx, now time.Time) error {
	var live [][]byte
	err := tx.Bucket(bucketLive).ForEach(func(k, _ []byte) error {
		live = append(live, slices.Clone(k))
		return nil
	})
	if err != nil {
		return err
	}
	usage := make(usageChanges)
	for _, k := range live {
		b, err := getBuild(tx, k)
		if err != nil {
			return fmt.Errorf("build %d: %w", keyID(k), err)
		}
		b.Status, b.Error, b.Stopped = StatusInternalError, "the server ended while it ran", now
		if err := putBuild(tx, b, nil, usage); err != nil {
			return err
		}
	}
	return usage.put(tx)
}
