package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// schemaVersion is that of the layout described here. A directory with a newer
// one is refused; one with an older one is brought up to date by Open.
const schemaVersion = 1

// The buckets of nbd.db. Ids are eight bytes, big endian. Records of paths and
// blobs are encoded as record.go says, all others as a version byte and JSON.
var (
	// meta: "schema" → uvarint; "clean" if the store was closed in order;
	// "checkpoint" → segment id and offset, up to where the commits in the
	// segments are in the database; "signed" → the names of public keys that the
	// bucket of that name was made for.
	bucketMeta = []byte("meta")
	// accounts: account id → accountRecord; its sequence gives the ids.
	bucketAccounts = []byte("accounts")
	// names: every account name that was ever used → account id.
	bucketNames = []byte("names")
	// keys: SHA-256 of an SSH public key in wire format → keyRecord.
	bucketKeys = []byte("keys")
	// settings: an owner, as settings.go encodes it → map of texts by name.
	bucketSettings = []byte("settings")
	// tokens: SHA-256 of a token → tokenRecord.
	bucketTokens = []byte("tokens")
	// views: account id → the bucket of its view, with the buckets below.
	bucketViews = []byte("views")
	// signed: signed.go has its keys → nothing.
	bucketSigned = []byte("signed")
	// blobs: SHA-256 of a NAR → blobRecord.
	bucketBlobs = []byte("blobs")
	// builds: build id → Build; its sequence gives the ids.
	bucketBuilds = []byte("builds")
	// buildindex: account id, build id → nothing, or 1 for a build that was no
	// run.
	bucketBuildIndex = []byte("buildindex")
	// live: ids of the builds that have not ended → nothing.
	bucketLive = []byte("live")
	// results: reuse key, account id or nothing → endsRecord.
	bucketResults = []byte("results")
	// recipes: reuse key → compressed text of the server, by which the build can
	// be made again.
	bucketRecipes = []byte("recipes")
	// usage: account id, month → Usage.
	bucketUsage = []byte("usage")
	// history: account id → the bucket of its runs: hash of system and package,
	// version → Run.
	bucketHistory = []byte("history")
)

// The buckets of a view. Store paths are written as base names. There is no
// index of referrers: it would take more than half of the cost of an upload,
// and who asks for them, rarely, can read all records (BenchmarkLookup).
var (
	// paths: path → record.
	viewPaths = []byte("paths")
	// derivers: path, 0, derivation in the view that has it as output → nothing.
	viewDerivers = []byte("derivers")
	// realisations: hash algorithm, hash modulo, output name → realisation.
	viewRealisations = []byte("realisations")
)

// viewEpoch is the key, in the bucket of a view, of a number that is raised
// when the content of a path is replaced: eight bytes, big endian; none is 0.
var viewEpoch = []byte("epoch")

var (
	metaSchema     = []byte("schema")
	metaClean      = []byte("clean")
	metaCheckpoint = []byte("checkpoint")
	metaSigned     = []byte("signed")
)

// initSchema makes the buckets of a new database and checks the version of an
// old one.
func initSchema(tx *bolt.Tx) error {
	meta, err := tx.CreateBucketIfNotExists(bucketMeta)
	if err != nil {
		return err
	}
	if b := meta.Get(metaSchema); b != nil {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return fmt.Errorf("schema version: %w", ErrDamaged)
		}
		if v > schemaVersion {
			return fmt.Errorf("%w: its schema is %d, this nbd knows up to %d", ErrTooNew, v, schemaVersion)
		}
	}
	for _, name := range [][]byte{bucketAccounts, bucketNames, bucketKeys, bucketSettings, bucketTokens, bucketViews, bucketSigned, bucketBlobs,
		bucketBuilds, bucketBuildIndex, bucketLive, bucketResults, bucketRecipes, bucketUsage, bucketHistory} {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	return meta.Put(metaSchema, binary.AppendUvarint(nil, schemaVersion))
}

// idKey returns the key of an id.
func idKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

// id is the reverse of idKey; 0 for what is no such key.
func keyID(k []byte) uint64 {
	if len(k) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(k)
}

// jsonVersion is the first byte of records that are JSON.
const jsonVersion = 1

// encodeJSON returns the encoding of a record that is JSON.
func encodeJSON(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return append([]byte{jsonVersion}, b...), nil
}

// decodeJSON decodes what encodeJSON made.
func decodeJSON(b []byte, v any) error {
	if len(b) == 0 || b[0] != jsonVersion {
		return fmt.Errorf("%w: record of an unknown version", ErrDamaged)
	}
	if err := json.Unmarshal(b[1:], v); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// getJSON decodes the record at a key; ok is false if there is none.
func getJSON(b *bolt.Bucket, key []byte, v any) (ok bool, err error) {
	rec := b.Get(key)
	if rec == nil {
		return false, nil
	}
	return true, decodeJSON(rec, v)
}

// putJSON stores a record under a key.
func putJSON(b *bolt.Bucket, key []byte, v any) error {
	rec, err := encodeJSON(v)
	if err != nil {
		return err
	}
	return b.Put(key, rec)
}

// pairKey returns the key that joins two base names.
func pairKey(a, b string) []byte {
	k := make([]byte, 0, len(a)+1+len(b))
	k = append(k, a...)
	k = append(k, 0)
	return append(k, b...)
}

// pairs calls f with the second names of the keys that begin with a.
func pairs(b *bolt.Bucket, a string, f func(second string) error) error {
	prefix := pairKey(a, "")
	c := b.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		if err := f(string(k[len(prefix):])); err != nil {
			return err
		}
	}
	return nil
}

// checkpoint returns up to where commits are in the database.
func checkpoint(tx *bolt.Tx) (at place, err error) {
	b := tx.Bucket(bucketMeta).Get(metaCheckpoint)
	if b == nil {
		return place{}, nil
	}
	if len(b) != 16 {
		return at, fmt.Errorf("checkpoint: %w", ErrDamaged)
	}
	return place{binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint64(b[8:]))}, nil
}

func putCheckpoint(tx *bolt.Tx, at place) error {
	b := binary.BigEndian.AppendUint64(nil, at.segment)
	return tx.Bucket(bucketMeta).Put(metaCheckpoint, binary.BigEndian.AppendUint64(b, uint64(at.offset)))
}

// databaseError turns the errors of bbolt that mean something to callers.
func databaseError(err error) error {
	switch {
	case errors.Is(err, berrors.ErrDatabaseNotOpen):
		return ErrClosed
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return fmt.Errorf("nbd.db is %w: %w", ErrDamaged, err)
	}
	return diskError(err)
}
