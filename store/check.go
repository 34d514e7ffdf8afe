package store

// A Report is what Check found.
type Report struct {
	Accounts int
	Paths    int
	Blobs    int
	Bytes    uint64 // of the blobs, each counted once
	// Problems has one sentence for each fault, at most MaxProblems.
	Problems []string
	// More counts the faults beyond those.
	More int
}

// MaxProblems bounds the list in a Report.
const MaxProblems = 1000

// OK reports whether nothing was wrong.
func (r *Report) OK() bool { return len(r.Problems) == 0 && r.More == 0 }
