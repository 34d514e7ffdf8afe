// Package store is what is on disk: the content of store paths, what each
// account knows of them, accounts with their keys, and the records and logs of
// builds. It knows nothing of connections or guests.
//
// # Views
//
// The store maps (account, store path) to content. What is known of a path
// (NAR hash and size, references, content address, deriver, signatures, times,
// realisations, uploaded logs) is the record of one account's view of it; two
// accounts may hold different content for one path. Below the views, content
// is named by the SHA-256 of its NAR alone, and equal bytes are stored once.
//
// A path in a view always has its whole closure in the view: Add and Register
// demand the references, Delete and GC refuse what is referred to. What is in a
// view keeps its content until it is deleted or repaired.
//
// # What accounts lend each other
//
// No method of Store answers about one view from another. A Sight does: it is
// what one account may use by a Trust, which says with whom it is linked, whose
// signatures count for it, and who offers what is signed (sight.go). Nothing of
// it is stored: a lent path is looked up in the lender's view whenever somebody
// asks, its signatures are verified over the record that is there then, and it
// is chosen only with its whole closure (choose.go). What the lender holds, and
// how he deletes it, never depends on who borrows: a session's choices keep the
// bytes by pins, not the lender's path by a lease. Lent content enters the own
// view when something there refers to it, with its closure, in the commit of
// what refers to it (adopt.go).
//
// # The state directory
//
//	nbd.db              bbolt: all records (schema.go has the buckets)
//	blobs/ab/ab12…      one NAR larger than 64 KiB, named by its SHA-256 in hex;
//	                    behind the NAR, its index in the encoding of nar.Index
//	                    and checksums of its chunks (sums.go)
//	segments/00000001   smaller NARs, each with its index, and the commits that
//	                    named them (frame.go has the layout); append-only
//	logs/0/7.log        the log of build 7 while it is written, logs/0/7.log.zst
//	                    when it has ended
//	drvlogs/1/x.drv.zst a build log that account 1 uploaded
//	tmp/                what is being received; emptied by Open
//
// A blob never changes. Files appear in blobs, logs and drvlogs by rename, when
// they are complete and synced. nbd.db is locked by the process that has it
// open.
//
// # Durability
//
// A path is acknowledged (Commit and Register return) when these have happened,
// in this order: its NAR is synced, as a file with its directory or within a
// segment; a frame that holds the path's record is in the segment; the segment
// is synced. Commits that wait at the same time share the last two steps, so
// that a burst costs one fdatasync whether it has one path or thousands. The
// database learns of it later (commit.go): what it has not learnt yet is in
// memory, and Open reads it from the segments again. Everything else is a
// transaction of the database, which is first brought up to date.
//
// A crash thus leaves files that nothing names, which the next Open removes,
// and the end of a segment that belongs to no commit, which it cuts off.
//
// # What keeps bytes
//
// A Lease keeps paths in their view. A path that is deleted is gone from
// queries at once. Its bytes go in a later Sweep, when no view has them, no
// upload under way counts on them, and even then an open Blob can still read
// them.
package store
